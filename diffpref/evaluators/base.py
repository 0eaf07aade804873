"""What an evaluator is: images and prompts in, one score each out, independent of batch-mates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffpref.processes import best_device

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Column:
    """How one column of scores is to be read.

    ``share`` marks values in [0, 1] that are shown in percent; ``per_image`` columns (text, say) are shown
    beside an image and never averaged. ``over_kinds``: the mean of a suite is that of its kinds' means, so
    that every kind of prompt counts the same.
    """

    label: str
    meaning: str
    higher_is_better: bool = True
    share: bool = False
    per_image: bool = False
    over_kinds: bool = False


@dataclass(frozen=True)
class Runtime:
    """Where the network of an evaluator comes from and runs.

    weights: folder, file or hub id; "" for the published ones. device: the best there is where none is given.
    dtype: of the network's weights and products; anything but fp32 is part of the fingerprint and of the
    stored scores. batch: images in one forward pass.
    """

    weights: str = ""
    device: str = ""
    dtype: Dtype = "fp32"
    batch: int = 32

    @property
    def chosen_device(self) -> str:
        """``device``, or the best there is; asked only when a network is loaded, for it imports torch."""
        return self.device or best_device()


@runtime_checkable
class Evaluator(Protocol):
    """One way of scoring images. The score of an image never depends on the others of its batch.

    An evaluator that sets ``any_mode = True`` gets images in the modes of their files, to resize them before
    they become RGB as its reference does; all others get RGB.
    """

    name: str
    version: str
    higher_is_better: bool
    needs_prompt: bool
    scale: str
    fingerprint: str

    def columns(self) -> dict[str, Column]:
        """Meaning of the score (key ``name``) and of every detail (key ``name.detail``)."""
        ...

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores [N] of images and their prompts, finite."""
        ...


@runtime_checkable
class DetailedEvaluator(Evaluator, Protocol):
    """An evaluator that also says why."""

    def explain(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32] | list[str]]]:
        """What ``score`` gives, and further columns by detail name, each [N]: numbers or short texts."""
        ...
