"""What evaluators see of awkward images: Pillow's own conversion, as the published scorers."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diffpref.data.images import ImageError, as_rgb, decode_for_scoring
from diffpref.evaluators.base import Runtime
from diffpref.evaluators.pixels import Pixels
from diffpref.scoring.judges import Judge
from tests.clips import MODES, file_of
from tests.evaluators import SmallNet

NOISE = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(as_rgb(decode_for_scoring(data)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_plain_rgb_is_unchanged(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(NOISE[..., :3]), kind, **options)
    assert (pixels(data) == NOISE[..., :3]).all()


def test_transparency_is_dropped_and_the_colours_under_it_show() -> None:
    assert (pixels(encoded(Image.fromarray(NOISE), "PNG")) == NOISE[..., :3]).all()
    grey = encoded(Image.fromarray(NOISE[..., :2], "LA"), "PNG")
    assert (pixels(grey) == NOISE[..., :1]).all()
    palette = Image.fromarray(NOISE[..., :3]).quantize(8)
    shown = np.asarray(palette.convert("RGB"))
    assert (pixels(encoded(palette, "PNG", transparency=0)) == shown).all()


def shrunk(image: Image.Image, rgb: str) -> list[int]:
    """RGB of an image resized to one pixel."""
    value = Pixels(1, "squash", (0.0,) * 3, (1.0,) * 3, rgb=rgb)(image)
    return [round(255 * channel) for channel in value.flatten().tolist()]


def test_what_is_resized_before_it_is_rgb_and_what_after() -> None:
    """Halves of red and green: opacity weighs them, palettes and 1-bit images give the nearest pixel."""
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 255))
    clear.paste((0, 255, 0, 0), (1, 0, 2, 2))
    assert (shrunk(clear, "last"), shrunk(clear, "first")) == ([255, 0, 0], [128, 128, 0])
    palette = clear.convert("RGB").quantize(2)
    assert (shrunk(palette, "last"), shrunk(palette, "first")) == ([0, 255, 0], [128, 128, 0])
    bits = Image.new("1", (2, 2), 0)
    bits.putpixel((1, 1), 1)  # the nearest to the middle, from the right and below
    assert (shrunk(bits, "last"), shrunk(bits, "first")) == ([255] * 3, [64] * 3)


@pytest.mark.parametrize("mode", MODES)
def test_evaluators_get_rgb_unless_they_take_any_mode(mode: str) -> None:
    image = decode_for_scoring(file_of(mode))
    assert image.mode == ("RGB" if mode in ("L", "I;16") else mode)
    network, runtime = SmallNet(Runtime()), Runtime()
    judged = Judge(network, runtime, 1).evaluate([image], ["a"], ["it"])
    assert judged["smallnet"][0] == network.score([image.convert("RGB")], ["a"])[0]


def test_orientation_of_exif_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert pixels(encoded(Image.fromarray(NOISE[..., :3]), "PNG", exif=exif)).shape == (6, 9, 3)


def test_cmyk_is_converted_as_pillow_does() -> None:
    data = encoded(Image.fromarray(NOISE, "CMYK"), "JPEG", quality=100)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert (pixels(data) == np.asarray(expected)).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 256 * 128, 65535]], np.uint16)
    assert pixels(encoded(Image.fromarray(values), kind))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(pixels(data).astype(int) - [255, 0, 0]).max() <= 2


def test_what_has_no_pixels_to_score_is_named() -> None:
    whole = encoded(Image.fromarray(NOISE[..., :3]).resize((300, 300)), "JPEG")
    for data, reason in [
        (None, "null"),
        (b"", "zero bytes"),
        (whole[: len(whole) // 2], "truncated"),
        (b"%PDF-1.7", "are not a JPEG, PNG, WEBP, GIF, BMP or TIFF image"),
        (encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "floating-point"),
    ]:
        with pytest.raises(ImageError) as raised:
            decode_for_scoring(data)
        assert reason in raised.value.reason
    with pytest.raises(ImageError, match="above the limit of 53 pixels"):
        decode_for_scoring(encoded(Image.fromarray(NOISE), "PNG"), max_pixels=53)
