"""Images to network inputs as torchvision's transforms make them, in Pillow, and batches of one fixed size."""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_EXTREME = 32
"""Sides in a ratio above this are resized in the crop alone: 1 x 60,000 pixels would become gigabytes."""


def centre_square(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """Shortest edge to `side` (bicubic, antialiased), centre crop, RGB: [side, side, 3].

    Equal, pixel for pixel and for every mode, to torchvision's Resize and CenterCrop on a Pillow image: the
    longer edge is cut to a whole number, half a pixel of margin is rounded to the even side (Hugging Face's
    processors round it down). Colours are converted last, as the published scorers do.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    longer = int(side * long / short)
    new_width, new_height = (side, longer) if width <= height else (longer, side)
    left, top = round((new_width - side) / 2), round((new_height - side) / 2)
    if long > _EXTREME * short:
        x, y = width / new_width, height / new_height
        box = (left * x, top * y, min(width, (left + side) * x), min(height, (top + side) * y))
        resized = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    elif (width, height) == (new_width, new_height):
        resized = image.crop((left, top, left + side, top + side))
    else:
        resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        resized = resized.crop((left, top, left + side, top + side))
    return np.asarray(resized.convert("RGB"))


def normalised(pixels: Sequence[NDArray[np.uint8]], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[H, W, 3] bytes to float32 [N, 3, H, W]: divided by 255, less the mean, over the deviation."""
    values = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(torch.float32).div_(255)
    return values.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1)).contiguous()


def image_key(image: Image.Image) -> str:
    """SHA-256 of an image's mode, size and pixels: equal images share features."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()


def in_batches(run: Callable[..., Tensor], size: int, *columns: Tensor) -> Tensor:
    """Rows of `run` over batches of exactly `size` rows.

    A short batch is filled up with copies of its last row, so every product has the same shape and a row's
    result is the same to the last bit whatever stands beside it.
    """
    results = []
    for start in range(0, len(columns[0]), size):
        rows = [column[start : start + size] for column in columns]
        count = len(rows[0])
        results.append(run(*(_filled(row, size) for row in rows))[:count])
    return torch.cat(results)


def _filled(rows: Tensor, size: int) -> Tensor:
    lacking = size - len(rows)
    return torch.cat([rows, rows[-1:].expand(lacking, *rows.shape[1:])]) if lacking else rows


class FeatureCache:
    """The most recently used features by key, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str) -> Tensor | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: str, value: Tensor) -> None:
        self._kept[key] = value
        self._kept.move_to_end(key)
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """No gradients, and full float32 in convolutions too, where CUDA would take TF32 by default."""
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
