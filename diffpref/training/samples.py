"""Image grids during training: fixed prompts and seeds, the base model's row above the policy's."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from diffpref.config import TrainConfig
from diffpref.evaluators import Evaluator, Runtime, load_evaluators
from diffpref.families.base import Family
from diffpref.paths import atomic_write_bytes
from diffpref.pipelines import build_scheduler
from diffpref.training.pair_errors import Autocast
from diffpref.training.policy import uncompiled

TEXT_LINES = 3
LABEL_WIDTH = 64


class SampleGrids:
    """RUN/samples/step-N.png. Make it while `unet` still is the base model.

    One process writes them. Others take part where a forward pass needs all of them (together).
    """

    def __init__(
        self,
        config: TrainConfig,
        prompts: list[str],
        family: Family,
        unet: nn.Module,
        folder: Path,
        accelerator: Accelerator,
        together: bool,
    ) -> None:
        """accelerator: images are drawn in its precision, and scored on its device."""
        self._autocast, self._train = accelerator.autocast, config.train
        writes = bool(accelerator.is_main_process)
        self._config, self._resolution = config.sampling, config.data.resolution
        self._keep_encoders = not config.data.cache_latents
        self._prompts, self._family, self._folder = prompts, family, folder
        self._writes, self._together = writes, together
        names = list(self._config.evaluators) if writes else []
        self._evaluators = grid_evaluators(names, accelerator.device)
        self._reference = self._base_row(unet)
        self._base_scores = {f"base_{name}": value for name, value in self._score(self._reference).items()}

    def save(self, step: int, unet: nn.Module) -> dict[str, float]:
        """Draw the prompts with the policy and write the grid of `step`.

        Returns mean scores of these images by sampling.evaluators, and of the base model's ("base_" before
        their names).
        """
        images = self._draw(unet)
        if not self._writes:
            return {}
        grid = draw_grid([("base", self._reference), (f"step {step}", images)], self._prompts)
        atomic_write_bytes(self._folder / f"step-{step}.png", _png(grid))
        return {**self._score(images), **self._base_scores}

    def _score(self, images: list[Image.Image]) -> dict[str, float]:
        return {
            evaluator.name: float(evaluator.score(images, self._prompts).mean())
            for evaluator in self._evaluators
        }

    def _base_row(self, unet: nn.Module) -> list[Image.Image]:
        """The base model's images: kept losslessly in base.png, so that a resumed run does not draw them
        again."""
        path, side = self._folder / "base.png", self._resolution
        if path.exists() and not self._together:
            with Image.open(path) as kept:
                kept.load()
                return [kept.crop((i * side, 0, (i + 1) * side, side)) for i in range(len(self._prompts))]
        images = self._draw(unet)
        strip = Image.new("RGB", (side * len(images), side))
        for number, image in enumerate(images):
            strip.paste(image, (number * side, 0))
        if self._writes:
            atomic_write_bytes(path, _png(strip))
        return images

    @torch.no_grad()
    def _draw(self, unet: nn.Module) -> list[Image.Image]:
        pipeline = self._family.pipeline(unet)
        pipeline.scheduler = build_scheduler(self._config.scheduler, pipeline.scheduler.config)
        images: list[Image.Image] = []
        batch = min(8, max(1, 2**21 // self._resolution**2))
        for start in range(0, len(self._prompts), batch):
            prompts = self._prompts[start : start + batch]
            seeds = [self._config.seed + start + offset for offset in range(len(prompts))]
            with uncompiled(self._train), autocasting(unet, self._autocast):
                images += pipeline(
                    prompt=prompts,
                    num_inference_steps=self._config.steps,
                    guidance_scale=self._config.guidance,
                    height=self._resolution,
                    width=self._resolution,
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                ).images
        if not self._keep_encoders:
            self._family.codec.release()
        self._family.release_text()
        return images


def grid_evaluators(names: Sequence[str], device: torch.device) -> list[Evaluator]:
    """The evaluators that score grids, on the device of the run."""
    return load_evaluators(names, {name: Runtime(device=str(device)) for name in names}) if names else []


@contextmanager
def autocasting(unet: Any, autocast: Autocast) -> Iterator[None]:
    """Inside the block `unet` runs in the run's precision and returns fp32, for the sampler to add up. Text
    encoders and VAE around it stay fp32: SDXL's VAE overflows in fp16."""
    forward = unet.forward

    def cast(*args: Any, **kwargs: Any) -> Any:
        with autocast():
            return convert_to_fp32(forward(*args, **kwargs))

    unet.forward = cast
    try:
        yield
    finally:
        del unet.forward  # the class's own is there again


def draw_grid(rows: list[tuple[str, list[Image.Image]]], captions: list[str]) -> Image.Image:
    """Rows of images with a name at the left and, under the last row, each column's caption."""
    cell = max(128, rows[0][1][0].width)
    font = ImageFont.load_default(size=11)
    grid = Image.new(
        "RGB", (LABEL_WIDTH + cell * len(captions), cell * len(rows) + 14 * TEXT_LINES + 6), "white"
    )
    pen = ImageDraw.Draw(grid)
    for row, (name, images) in enumerate(rows):
        pen.text((4, row * cell + cell // 2), name, fill="black", font=font)
        for column, image in enumerate(images):
            shown = image.resize(
                (cell - 4, cell - 4),
                Image.Resampling.NEAREST if image.width < cell else Image.Resampling.LANCZOS,
            )
            grid.paste(shown, (LABEL_WIDTH + column * cell + 2, row * cell + 2))
    for column, caption in enumerate(captions):
        lines = textwrap.wrap(caption, width=max(8, cell // 6), max_lines=TEXT_LINES, placeholder="...")
        pen.multiline_text(
            (LABEL_WIDTH + column * cell + 2, len(rows) * cell + 2), "\n".join(lines), fill="black", font=font
        )
    return grid


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
