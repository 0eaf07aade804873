"""The form that most evaluators share: a function of the cosine of an image and its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffpref.evaluators.base import Column, Dtype
from diffpref.evaluators.clip import Clip
from diffpref.paths import fingerprint

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """``rescale(cosine(image, prefix + prompt))``.

    version: of the computation; a dtype other than fp32 is added to it. scale: what exactly a score is.
    """

    name: str
    computation: str
    scale: str
    label: str
    meaning: str
    clip: Clip
    rescale: Callable[[Doubles], Doubles]
    prefix: str = ""
    higher_is_better: bool = True
    needs_prompt: bool = True
    any_mode: bool = True

    @property
    def version(self) -> str:
        return with_dtype(self.computation, self.clip.network.dtype)

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            {"evaluator": self.name, "version": self.version, "prefix": self.prefix} | self.clip.describe()
        )

    def columns(self) -> dict[str, Column]:
        limit = self.clip.network.context
        return {
            self.name: Column(self.label, f"{self.meaning}: {self.scale}"),
            f"{self.name}.cut": Column(
                "Tokens cut",
                f"tokens of the prompt beyond the {limit} that the text encoder reads, which it never sees",
                higher_is_better=False,
                per_image=True,
            ),
        }

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Floats:
        """Scores [N] of images of any mode and their prompts; an empty prompt is a text of no words."""
        texts = [self.prefix + prompt for prompt in prompts]
        return self.rescale(self.clip.cosines(images, texts)).astype(np.float32)

    def explain(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> tuple[Floats, dict[str, Floats | list[str]]]:
        texts = [self.prefix + prompt for prompt in prompts]
        return self.score(images, prompts), {"cut": self.clip.cut(texts)}


def with_dtype(version: str, dtype: Dtype) -> str:
    """Scores of lower precision are another version: they do not compare bit by bit."""
    return version if dtype == "fp32" else f"{version}, {dtype}"
