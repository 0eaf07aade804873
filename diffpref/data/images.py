"""The one place where image bytes become pixels.

Everything that reaches a model goes through `decode_image`: an allow-list of formats, a pixel limit checked
on the header before anything is decoded, and one defined result (8-bit RGB) for every kind of file.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffpref.files import LARGEST_IMAGE

if TYPE_CHECKING:
    import torch

FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP")
SCORED_FORMATS: tuple[str, ...] = (*FORMATS, "GIF", "BMP", "TIFF")
UNLIKE_RGB = ("1", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB")
"""Modes in which Pillow resizes otherwise than in RGB; a resized grey image is the same in either order."""
MAX_PIXELS = 64 * 1024 * 1024
"""Largest width x height that is decoded: 8192 x 8192, ample for any diffusion model, 192 MiB as RGB."""

ORIENTATION = 0x0112  # of EXIF; 5 to 8 exchange width and height
T = TypeVar("T")

# A bomb is refused by MAX_PIXELS, and what else decoders only warn of (damaged EXIF) has a defined result; a
# line for each would drown the report. Not around each call: that is not safe beside other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(Exception):
    """Image bytes that cannot be used. `reason` is one short clause without the row's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class PixelSample:
    """An image at training size.

    pixels: uint8 [height, width, 3], RGB.
    original_size: (height, width) of the decoded image, before resizing (SDXL's original_size).
    crop: (top, left) of the crop, in pixels of the resized image (SDXL's crops_coords_top_left).
    resized_width: width of the resized image, of which the crop is a part.
    """

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    original_size: tuple[int, int]
    crop: tuple[int, int]
    resized_width: int

    def mirrored(self) -> PixelSample:
        """The same crop of the mirrored image."""
        left = self.resized_width - self.pixels.shape[1] - self.crop[1]
        return replace(self, pixels=self.pixels[:, ::-1], crop=(self.crop[0], left))


def decode_image(data: bytes | None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode JPEG, PNG or WEBP bytes into an 8-bit RGB image, upright.

    Defined results: EXIF orientation is applied; transparency is composited on white; palette, grey, CMYK and
    YCCK are converted; 16-bit grey is scaled to 8 bits; of an animation the first frame is taken. Embedded
    colour profiles are ignored, as the public training loaders do.

    Raises ImageError: null, empty, not an image, a format outside FORMATS, more than `max_pixels` (seen in
    the header, nothing is decoded), truncated or damaged.
    """
    return _opened(data, max_pixels, FORMATS, _to_rgb)


def decode_for_scoring(data: bytes | None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode image bytes into what the published scorers open: an image of which `convert("RGB")` is theirs.

    Its mode is that of the file where it matters whether an image is resized before that conversion or after
    (`UNLIKE_RGB`, see `evaluators.pixels`), else RGB. Unlike in `decode_image` EXIF orientation is ignored,
    and `convert` drops transparency, so that the colours stored under transparent pixels show: that is what
    published scores were made from. Of an animation the first frame is taken, embedded colour profiles are
    ignored. One exception: 16-bit grey is scaled to 8 bits, where `convert` makes everything above 255 white.

    Raises ImageError: null, empty, not an image, a format outside SCORED_FORMATS, floating-point pixels (they
    have no defined range), more than `max_pixels`, truncated or damaged.
    """
    return _opened(data, max_pixels, SCORED_FORMATS, _as_stored)


def as_rgb(image: Image.Image) -> Image.Image:
    """The image itself where it is RGB, else Pillow's conversion, which drops transparency."""
    return image if image.mode == "RGB" else image.convert("RGB")


def image_size(data: bytes | None) -> tuple[int, int]:
    """(height, width) that `decode_image` would give, by the header. Raises ImageError."""
    return _opened(data, MAX_PIXELS, FORMATS, _upright_size)


def _opened(
    data: bytes | None, max_pixels: int, formats: tuple[str, ...], use: Callable[[Image.Image], T]
) -> T:
    """What `use` makes of an image whose header was read. Raises ImageError for all that goes wrong."""
    if data is None:
        raise ImageError("image is null")
    if len(data) == 0:
        raise ImageError("image has zero bytes")
    if len(data) > LARGEST_IMAGE:
        raise ImageError(f"image has {len(data):,} bytes, above the limit of {LARGEST_IMAGE:,}")
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"image of {width}x{height} is above the limit of {max_pixels} pixels")
            return use(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"bytes are not a {', '.join(formats[:-1])} or {formats[-1]} image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"image is above the limit of {max_pixels} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        reason = f"image is truncated or damaged ({type(error).__name__}: {_short(error)})"
        raise ImageError(reason) from error


def to_pixels(
    image: Image.Image, size: tuple[int, int], place: tuple[float, float] | None = None
) -> PixelSample:
    """Resize until the image just covers `size` (height, width; Lanczos, antialiased), and crop to it.

    place: where the crop lies in what is left over, from 0 (top, left) to below 1; None: the centre.
    Equal to resizing the whole image and cropping, but only the crop is ever computed, so that a 1 x 60,000
    image costs no more than any other. An image that already has the size is returned unchanged.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {size}")
    old_width, old_height = image.size
    scale = max(width / old_width, height / old_height)
    new_width, new_height = max(width, round(old_width * scale)), max(height, round(old_height * scale))
    top, left = (new_height - height) // 2, (new_width - width) // 2
    if place is not None:
        top, left = int(place[0] * (new_height - height + 1)), int(place[1] * (new_width - width + 1))
    if (new_width, new_height) != (old_width, old_height):
        x, y = old_width / new_width, old_height / new_height
        box = (left * x, top * y, min(old_width, (left + width) * x), min(old_height, (top + height) * y))
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    elif (old_width, old_height) != (width, height):
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.uint8)
    return PixelSample(pixels, (old_height, old_width), (top, left), new_width)


def as_tensor(samples: Sequence[PixelSample]) -> torch.Tensor:
    """Stack samples of one size into float32 [B, 3, H, W] in [-1, 1]: the VAE's input."""
    import torch  # here, since looking through images needs none of it and it takes seconds to import

    stacked = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
    return stacked.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        upright = _grey_to_8_bits(upright)
    if "A" in upright.getbands() or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return upright.convert("RGB")


def _as_stored(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "F":
        raise ImageError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):
        image = _grey_to_8_bits(image)
    return image.copy() if image.mode in UNLIKE_RGB else image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey over its full range; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.float64).clip(0, 65535)
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 80 else text[:77] + "..."
