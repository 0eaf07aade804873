"""Scores of the package hpsv2x 1.2.0 on a small network whose weights are a function of their names.

    pip install --no-deps hpsv2x==1.2.0 clint args webdataset braceexpand torchvision   # beside torch
    PYTHONPATH=. python tests/parity/golden/hps.py

runs the package's own `score` and writes hps.json, which tests/parity/with_torchvision/hps.py reads.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

FILE = Path(__file__).with_suffix(".json")
CASES = [
    ((96, 96), "a photo of a cat"),
    ((832, 1216), "black &amp; white, &amp;lt;b&amp;gt;, salt & pepper"),
    ((1000, 768), "a red fox and a blue heron stand by the river at dawn, " * 12),
    ((301, 120), ""),
    ((20, 33), "🐱 in a café — naïve, 4k 😀"),
    ((65, 64), "Two  DOGS\tplaying\nchess, it's the dog's move!"),
]


def named_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random values whose seed is the name's checksum, large enough for small differences to show."""
    weights = {}
    for name, shape in shapes.items():
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) > 1:
            values *= 1.5 / shape[-1] ** 0.5
        elif name.endswith("weight"):
            values = 1 + 0.1 * values
        weights[name] = torch.tensor(0.1 * values if len(shape) == 1 and "bias" in name else values).float()
    return weights


def make(config: dict[str, Any]) -> list[float]:
    from hpsv2 import img_score
    from hpsv2.src import open_clip

    from tests.clips import picture

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "small.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
        model, _, transform = open_clip.create_model_and_transforms(
            "small", None, device="cpu", light_augmentation=True, output_dict=True,
            with_score_predictor=False, with_region_predictor=False,
        )  # fmt: skip
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        torch.save({"state_dict": named_weights(shapes)}, Path(folder) / "small.pt")
        img_score.model_dict.update(model=model, preprocess_val=transform)
        return [
            float(img_score.score([picture(*size)], prompt, cp=f"{folder}/small.pt")[0])
            for size, prompt in CASES
        ]


if __name__ == "__main__":
    from diffpref.torchvision_ops import mend_torchvision

    mend_torchvision()
    from tests.clips import OPEN_CLIP_CONFIG

    FILE.write_text(json.dumps({"hpsv2x 1.2.0": make(OPEN_CLIP_CONFIG)}, indent=2) + "\n")
