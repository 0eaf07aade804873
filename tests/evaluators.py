"""A small real evaluator for tests, and the command line with it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from diffpref import cli
from diffpref.evaluators import EVALUATORS, Column, Runtime


class SmallNet:
    """A convolution of the image times an embedding of the prompt's bytes, weights from a seed."""

    name, version, higher_is_better, needs_prompt = "smallnet", "1", True, True
    scale = "any number"

    def __init__(self, runtime: Runtime) -> None:
        generator = torch.Generator().manual_seed(3)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[runtime.dtype]
        self.kernel = torch.randn(8, 3, 5, 5, generator=generator).to(self.dtype)
        self.words = torch.randn(256, 8, generator=generator).to(self.dtype)
        self.fingerprint = f"seed 3 {runtime.dtype}"
        self.delay = float(os.environ.get("SMALLNET_DELAY", "0"))
        self.scored = 0

    def columns(self) -> dict[str, Column]:
        return {
            "smallnet": Column("SmallNet", "a number"),
            "smallnet.size": Column("Size", "its width", per_image=True),
        }

    def explain(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> tuple[np.ndarray, dict[str, list[str]]]:
        time.sleep(self.delay * len(images))
        self.scored += len(images)
        pixels = torch.stack(
            [torch.from_numpy(np.asarray(image.resize((32, 32))).copy()) for image in images]
        )
        features = torch.conv2d(pixels.permute(0, 3, 1, 2).to(self.dtype) / 255, self.kernel).mean((2, 3))
        words = torch.stack([self.words[list(prompt.encode())].sum(0) for prompt in prompts])
        scores = (features * words).sum(1).float().numpy()
        return scores, {"size": [str(image.width) for image in images]}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return self.explain(images, prompts)[0]


def main(arguments: list[str]) -> int:
    """The command line with it. SMALLNET_LOG: a file to which the number of scored images is added."""
    loaded: list[SmallNet] = []
    EVALUATORS["smallnet"] = lambda runtime: loaded.append(SmallNet(runtime)) or loaded[-1]
    code = cli.main(arguments)
    if os.environ.get("SMALLNET_LOG"):
        with open(os.environ["SMALLNET_LOG"], "a") as log:
            log.write(f"{loaded[0].scored}\n")
    return code
