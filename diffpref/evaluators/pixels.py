"""How an image becomes the input of a CLIP network, exactly as the reference implementations do it.

Equal pixel for pixel to what they compute with transformers' Pillow processor or with torchvision, and made
with Pillow and torch alone. References differ where an odd margin is cropped (one pixel), in padding or
cropping what is not square, and in resizing a file's own pixels (a palette, say) before or after they become
RGB; all change scores, so the rule is part of every fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from diffpref.data.images import as_rgb

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

Fit = Literal["crop, floor", "crop, round", "squash", "pad", "pad, aliased"]
Box = tuple[int, int, int, int]

_MOST_PIXELS = 64 * 1024 * 1024
"""Above this an image resized before its crop would be too large to hold: a line of pixels, say."""


@dataclass(frozen=True)
class Pixels:
    """The input rule of a network.

    size: side of the square input. fit: how an image of another shape becomes a square:

    - ``crop``: shortest side to ``size`` on 8-bit pixels, centre crop; an odd margin is halved downwards
      (``floor``: transformers' PIL processor, PickScore) or to the even neighbour (``round``: torchvision,
      OpenAI's CLIP, open_clip);
    - ``squash``: both sides to ``size`` on 8-bit pixels;
    - ``pad``: longest side to ``size`` on float pixels, then zeros (black) around before normalising (HPS);
      ``aliased``: without the antialiasing filter, as torchvision before 0.17 resized tensors.

    mean, std: of the channels, of values in 0..1. rgb: whether an image becomes RGB before it is resized
    (transformers, HPS) or after (torchvision's transforms of OpenAI's CLIP, open_clip and ImageReward, which
    resize palettes and 1-bit images to the nearest pixel and weigh colours with their opacity).
    """

    size: int = 224
    fit: Fit = "crop, round"
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    rgb: Literal["first", "last"] = "first"

    def read(self, image: Image.Image) -> Image.Image:
        """The image as the rule begins with it."""
        return image if self.rgb == "last" else as_rgb(image)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """float32 [3, size, size] of an image of any mode."""
        image = self.read(image)
        if self.fit in ("pad", "pad, aliased"):
            square = self._padded(image)
        else:
            square = _as_float(as_rgb(self._resized(image)))
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return square.sub_(mean).div_(std)

    def plan(self, size: tuple[int, int]) -> tuple[Any, ...]:
        """What is done to a read image of (width, height): equal plans give equal inputs for equal images."""
        steps: Any = self.fit if self.fit.startswith("pad") else self._steps(size)
        return (self.size, steps, self.mean, self.std, self.resample)

    def describe(self) -> dict[str, Any]:
        """As plain values, for fingerprints; "first" is left out, as before there was another."""
        values = asdict(self) | {"mean": list(self.mean), "std": list(self.std)}
        return {name: value for name, value in values.items() if value != "first"}

    def _steps(self, size: tuple[int, int]) -> tuple[tuple[int, int], Box]:
        """Width and height to resize to, and the box to cut out of that."""
        side = self.size
        if self.fit == "squash":
            return (side, side), (0, 0, side, side)
        short = min(size)
        width, height = (side if edge == short else int(side * edge / short) for edge in size)
        left, top = self._margin(width - side), self._margin(height - side)
        return (width, height), (left, top, left + side, top + side)

    def _margin(self, excess: int) -> int:
        return excess // 2 if self.fit == "crop, floor" else round(excess / 2.0)

    def _resized(self, image: Image.Image) -> Image.Image:
        resample = Image.Resampling.BICUBIC if self.resample == "bicubic" else Image.Resampling.BILINEAR
        (width, height), box = self._steps(image.size)
        if width * height > _MOST_PIXELS:
            x, y = image.width / width, image.height / height
            source = (box[0] * x, box[1] * y, min(image.width, box[2] * x), min(image.height, box[3] * y))
            return image.resize((self.size, self.size), resample, box=source)
        if image.size != (width, height):
            image = image.resize((width, height), resample)
        return image.crop(box)

    def _padded(self, image: Image.Image) -> torch.Tensor:
        side = self.size
        scale = side / max(image.size)
        width, height = (max(1, round(edge * scale)) for edge in image.size)
        values = _as_float(image)
        if scale != 1:
            values = torch.nn.functional.interpolate(
                values[None], (height, width), mode=self.resample, align_corners=False,
                antialias=self.fit == "pad",
            )[0]  # fmt: skip
        left, top = (side - width) // 2, (side - height) // 2
        return torch.nn.functional.pad(values, (left, side - width - left, top, side - height - top))


def content(image: Image.Image) -> Hashable:
    """The same for images with the same pixels, in practice for no others."""
    palette = tuple(image.getpalette() or ()) if image.mode == "P" else ()
    return image.mode, image.size, palette, hashlib.sha256(image.tobytes()).digest()


def distinct(items: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Where each different item stands first, and for every item its number among these."""
    firsts: dict[Hashable, int] = {}
    for place, item in enumerate(items):
        firsts.setdefault(item, place)
    numbers = {item: number for number, item in enumerate(firsts)}
    return list(firsts.values()), [numbers[item] for item in items]


def _as_float(image: Image.Image) -> torch.Tensor:
    """float32 [3, height, width] in 0..1 of an RGB image."""
    values = torch.from_numpy(np.array(image, dtype=np.uint8))
    return values.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
