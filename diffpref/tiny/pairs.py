"""The shipped preference pairs: images of several checkpoints, labelled by the oracle as noisy humans would.

Run `python -m diffpref.tiny.pairs --work DIR --out DIR` after `python -m diffpref.tiny.pretrain --work DIR`;
under `torchrun --nproc_per_node 2` (with `--threads 1`) two processes share the work.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffpref.tiny.grammar import is_held_out, kind_caption
from diffpref.tiny.oracle import Judgement, judge
from diffpref.tiny.pretrain import (
    BASE_STEP,
    STRONGER_STEP,
    WEAKER_STEP,
    assemble,
    load_tokenizer,
    load_vae,
    say,
)
from diffpref.tiny.scenes import KINDS, sample_scene
from diffpref.tiny.team import Team

TRAIN_PAIRS, VALIDATION_PAIRS = 3_200, 320
CHUNK = 40
SOURCES = {WEAKER_STEP: 0.4, BASE_STEP: 0.3, STRONGER_STEP: 0.3}
"""Share of the images drawn from each checkpoint (by its pretraining step)."""
GUIDANCE = (2.0, 3.5, 5.0, 7.5)
SAMPLING_STEPS = 16
TEMPERATURE = 0.04
"""Bradley-Terry: P(image 0 wins) = sigmoid((utility_0 - utility_1) / TEMPERATURE)."""
INDISTINCT = 0.01
"""Utilities closer than this are a tie (label 0.5)."""
JPEG_QUALITY = 90
SEED = 41


@dataclass(frozen=True)
class Request:
    """One image to be made."""

    prompt: str
    source: int
    guidance: float
    seed: int


def _prompt(rng: np.random.Generator, held_out: bool) -> str:
    while True:
        caption = kind_caption(sample_scene(rng, KINDS[rng.integers(len(KINDS))]), rng)
        if is_held_out(caption) == held_out:
            return caption


def _requests(split: str, index: int) -> tuple[Request, Request]:
    """The two images of pair `index`: one prompt, each with its own source, guidance scale and seed."""
    rng = np.random.default_rng([SEED, split == "validation", index])
    prompt = _prompt(rng, held_out=split == "validation")
    steps, shares = list(SOURCES), list(SOURCES.values())
    first, second = (
        Request(
            prompt, int(rng.choice(steps, p=shares)), float(rng.choice(GUIDANCE)), int(rng.integers(2**31))
        )
        for _ in range(2)
    )
    return first, second


def sample(pipelines: dict[int, StableDiffusionPipeline], requests: list[Request]) -> list[Image.Image]:
    """Images for all requests; those that share a source and a guidance scale go through in one batch."""
    images: dict[int, Image.Image] = {}
    groups: dict[tuple[int, float], list[int]] = {}
    for position, request in enumerate(requests):
        groups.setdefault((request.source, request.guidance), []).append(position)
    for (source, guidance), positions in groups.items():
        output = pipelines[source](
            [requests[p].prompt for p in positions],
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(requests[p].seed) for p in positions],
            height=64,
            width=64,
        ).images
        images |= dict(zip(positions, output, strict=True))
    return [images[p] for p in range(len(requests))]


def to_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def prefer(first: Judgement, second: Judgement, rng: np.random.Generator) -> float:
    """label_0 by the Bradley-Terry model: 1.0, 0.0, or 0.5 for a tie."""
    gap = first.utility - second.utility
    if abs(gap) < INDISTINCT:
        return 0.5
    return float(rng.random() < 1 / (1 + math.exp(-gap / TEMPERATURE)))


def _row(split: str, index: int, pair: tuple[Request, Request], images: list[Image.Image]) -> dict[str, Any]:
    jpegs = [to_jpeg(image) for image in images]
    # judged as users will see them: after the JPEG
    verdicts = [judge(Image.open(io.BytesIO(data)), pair[0].prompt) for data in jpegs]
    coin = np.random.default_rng([SEED, 7, split == "validation", index])
    label = prefer(verdicts[0], verdicts[1], coin)
    row: dict[str, Any] = {
        "caption": pair[0].prompt,
        "label_0": label,
        "label_1": 1 - label,
        "has_label": True,
        "are_different": label != 0.5,
        "ranking_id": index,
        "kind": verdicts[0].kind,
    }
    for k in (0, 1):
        row |= {
            f"jpg_{k}": jpegs[k],
            f"caption_{k}": verdicts[k].caption,
            f"model_{k}": f"tiny-step-{pair[k].source}",
            f"guidance_{k}": pair[k].guidance,
            f"seed_{k}": pair[k].seed,
            f"facts_{k}": round(verdicts[k].facts, 4),
            f"style_{k}": round(verdicts[k].style, 4),
        }
    return row


def make_split(
    split: str,
    count: int,
    pipelines: dict[int, StableDiffusionPipeline],
    work: Path,
    say: Callable[[str], None],
) -> pa.Table:
    """All pairs of a split; finished chunks are kept in `work`, so a killed run goes on where it was."""
    folder = work / "pairs" / split
    folder.mkdir(parents=True, exist_ok=True)
    team = Team.join()
    for start in range(team.rank * CHUNK, count, team.world * CHUNK):
        path = folder / f"{start:06d}.parquet"
        if path.exists():
            continue
        indices = range(start, min(count, start + CHUNK))
        pairs = [_requests(split, index) for index in indices]
        images = sample(pipelines, [request for pair in pairs for request in pair])
        rows = [
            _row(split, index, pair, images[2 * k : 2 * k + 2])
            for k, (index, pair) in enumerate(zip(indices, pairs, strict=True))
        ]
        staged = path.with_suffix(".staged")
        pq.write_table(pa.Table.from_pylist(rows), staged)
        staged.replace(path)
        say(f"{split} pairs {min(count, start + CHUNK)}/{count}")
    team.wait()
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m diffpref.tiny.pairs", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the pretraining run")
    parser.add_argument(
        "--out", type=Path, required=True, help="where train.parquet and validation.parquet go"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    vae, tokenizer = load_vae(options.work), load_tokenizer(options.work)
    pipelines = {step: assemble(options.work, step, vae, tokenizer) for step in SOURCES}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for split, count in (("validation", VALIDATION_PAIRS), ("train", TRAIN_PAIRS)):
        table = make_split(split, count, pipelines, options.work, say)
        if Team.join().leads:
            pq.write_table(table, options.out / f"{split}.parquet", compression="zstd", row_group_size=400)


if __name__ == "__main__":
    main()
