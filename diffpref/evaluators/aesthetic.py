"""LAION's aesthetic predictor v2 (C. Schuhmann, *improved-aesthetic-predictor*, its linear MSE head)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from diffpref.evaluators.agreement import with_dtype
from diffpref.evaluators.base import Column, Runtime
from diffpref.evaluators.checkpoints import find_file, load_state, read_state, weights_hash
from diffpref.evaluators.clip import Clip
from diffpref.evaluators.clip_score import VIT_L_14
from diffpref.evaluators.loading import load_clip
from diffpref.paths import fingerprint

REPOSITORY = "camenduru/improved-aesthetic-predictor"
STEM = "sac+logos+ava1-l14-linearMSE"


@dataclass(frozen=True)
class Aesthetic:
    """Five linear layers on the unit vector of a CLIP ViT-L/14; the prompt plays no part."""

    clip: Clip
    head: nn.ModuleDict
    name: str = "aesthetic"
    higher_is_better: bool = True
    needs_prompt: bool = False
    any_mode: bool = True
    scale: str = "predicted mean rating, 1 to 10 (generated images mostly 5 to 6.5)"

    @property
    def version(self) -> str:
        return with_dtype("2", self.clip.network.dtype)

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            {"evaluator": self.name, "version": self.version, "head": weights_hash(self.head)}
            | self.clip.describe()
        )

    def columns(self) -> dict[str, Column]:
        meaning = f"looks of the image, whatever the prompt asked for: {self.scale}"
        return {self.name: Column("Aesthetic", meaning)}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores [N] of images of any mode; prompts are not read."""
        with torch.inference_mode():
            # Row by row: the product of a matrix may round differently with its number of rows.
            rows = [
                self.head["layers"](torch.from_numpy(vector)) for vector in self.clip.embed_images(images)
            ]
        return torch.cat(rows).numpy() if rows else np.zeros(0, np.float32)


def load(runtime: Runtime) -> Aesthetic:
    """The published head on OpenAI's ViT-L/14.

    Weights: the head's ``.pth`` file or its safetensors copy, a folder with either, or a hub id. The CLIP is
    the folder ``clip`` beside the head (transformers' CLIPModel) if there is one, else OpenAI's from the
    cache or the hub. The head runs in fp32 whatever the dtype.

    Raises:
        UserError: weights are missing or do not fit.
    """
    names = [f"{STEM}.pth", f"{STEM}.safetensors"]
    path = find_file(runtime.weights, names, REPOSITORY, "weights of aesthetic")
    beside = path.parent / "clip"
    clip = load_clip(str(beside) if beside.is_dir() else VIT_L_14, runtime)
    width = clip.network.width
    head = build_head(width)
    load_state(head, read_state(path), str(path), f"the predictor on vectors of width {width}")
    return of_clip(clip, head)


def of_clip(clip: Clip, head: nn.ModuleDict) -> Aesthetic:
    """The predictor as this CLIP and this head give it."""
    pixels = replace(clip.pixels, fit="crop, round", rgb="last")
    return Aesthetic(Clip(clip.network, pixels, clip.text, clip.batch), head)


def build_head(width: int) -> nn.ModuleDict:
    """The published stack by its published names: linear layers, which dropout kept apart in training."""
    apart = nn.Identity
    layers = nn.Sequential(
        nn.Linear(width, 1024), apart(),
        nn.Linear(1024, 128), apart(),
        nn.Linear(128, 64), apart(),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )  # fmt: skip
    return nn.ModuleDict({"layers": layers}).requires_grad_(False).eval()
