"""Random drawings outside the world of shapes, so that the autoencoder can carry users' own pictures too."""

from __future__ import annotations

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from diffpref.tiny.scenes import SIZE

_SCALE = 2


def _color(rng: np.random.Generator) -> tuple[int, int, int]:
    hue, saturation, value = rng.random(), rng.beta(2, 1.2), rng.beta(3, 1)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _primitive(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: float) -> None:
    side = SIZE * _SCALE
    x, y = rng.normal(side / 2, side / 6, 2)
    width, height = size * rng.uniform(0.4, 1.0, 2)
    box = (x - width, y - height, x + width, y + height)
    fill = _color(rng)
    kind = rng.integers(6)
    if kind == 0:
        draw.ellipse(box, fill)
    elif kind == 1:
        draw.rounded_rectangle(box, radius=float(rng.uniform(0, min(width, height))), fill=fill)
    elif kind == 2:
        corners = int(rng.integers(3, 8))
        turn = rng.uniform(0, 2 * math.pi) + np.arange(corners) * 2 * math.pi / corners
        reach = rng.uniform(0.5, 1.0, corners)
        points = np.stack([x + width * reach * np.cos(turn), y + height * reach * np.sin(turn)], axis=1)
        draw.polygon([(float(a), float(b)) for a, b in points], fill)
    elif kind == 3:
        start = rng.uniform(0, 360)
        draw.pieslice(box, start, start + rng.uniform(60, 300), fill)
    elif kind == 4:
        start = rng.uniform(0, 360)
        draw.arc(box, start, start + rng.uniform(60, 300), fill, width=int(rng.integers(3, 12)))
    else:
        draw.line([(box[0], box[1]), (box[2], box[3])], fill, width=int(rng.integers(3, 14)))


def _shade(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A soft light from one side, as shaded drawings have."""
    side = image.width
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 + rng.uniform(0.1, 0.5) * (x * math.cos(angle) + y * math.sin(angle))
    return Image.fromarray(np.clip(np.asarray(image) * light[..., None], 0, 255).astype(np.uint8))


def doodle(seed: int, index: int) -> Image.Image:
    """Drawing number `index`: three to nine overlapping forms, large ones first, on a plain ground."""
    rng = np.random.default_rng([seed, 1, index])
    ground = (255, 255, 255) if rng.random() < 0.6 else _color(rng)
    image = Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE), ground)
    sizes = sorted((float(s) for s in rng.uniform(4, 26, int(rng.integers(3, 10))) * _SCALE), reverse=True)
    draw = ImageDraw.Draw(image)
    for size in sizes:
        _primitive(draw, rng, size)
    if rng.random() < 0.5:
        image = _shade(image, rng)
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2))))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)
