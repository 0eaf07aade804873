"""Pairs read by networks whose scores padding would move: only those of one shape go together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffpref.evaluators.pixels import content, distinct
from diffpref.language_models.loading import chunks

T = TypeVar("T")


def unpadded_outputs(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    prepare: Callable[[Image.Image, str], tuple[tuple[int, ...], T]],
    outputs: Callable[[list[T]], Tensor],
    rows: int,
) -> NDArray[np.float32]:
    """What a network gives for each pair, [N, 2]; equal pairs are read once.

    prepare: of an image and its prompt, their shape and what the network reads. outputs: [B, 2] of at most
    `rows` pairs of one shape, on whatever device; all are fetched together.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    firsts, numbers = distinct([(content(i), p) for i, p in zip(images, prompts, strict=True)])
    pairs = [prepare(images[first], prompts[first]) for first in firsts]
    shapes = [shape for shape, _ in pairs]
    order = sorted(range(len(pairs)), key=lambda i: shapes[i])
    parts = list(chunks(order, shapes, rows, True))
    given = [outputs([pairs[i][1] for i in part]) for part in parts]
    found = np.zeros((len(pairs), 2), np.float32)
    if given:
        found[[i for part in parts for i in part]] = torch.cat(given).float().cpu().numpy()
    return found[numbers]
