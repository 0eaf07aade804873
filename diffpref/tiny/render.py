"""Anti-aliased rendering of scenes from signed distances."""

from __future__ import annotations

import colorsys
import math

import numpy as np
from PIL import Image

from diffpref.tiny.scenes import HUES, SIZE, Scene, Thing

OUTLINE = 2.0
"""Width of an outline in pixels, around the shape."""
TEXTURE = 0.075
"""Amplitude of background texture, in units of the 0..1 range."""


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels (negative inside) of points (x, y) from a shape centred at the origin."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - radius
    if shape == "diamond":
        return (abs(x) + abs(y) - radius) / math.sqrt(2)
    if shape == "triangle":
        # apex up, base and height both 2 * radius
        slope = (2 * abs(x) - y - radius) / math.sqrt(5)
        return np.maximum(slope, y - radius)
    if shape == "cross":
        arm = 0.4 * radius
        upright = np.maximum(abs(x) - arm, abs(y) - radius)
        across = np.maximum(abs(x) - radius, abs(y) - arm)
        return np.minimum(upright, across)
    raise ValueError(f"unknown shape {shape!r}")


def rgb(color: str, saturation: float) -> np.ndarray:
    """RGB in 0..1 of a colour word; muted colours are a little darker, as in paint."""
    value = 0.93 if saturation > 0.7 else 0.80
    return np.array(colorsys.hsv_to_rgb(HUES[color] / 360, saturation, value))


def _background(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    style = scene.style
    if style.texture == "stripes":
        wave = (x // 8 % 2) - 0.5
    elif style.texture == "checks":
        wave = ((x // 16 + y // 16) % 2) - 0.5
    else:
        wave = np.zeros_like(x)
    # textures go inwards from the tone, so that light and dark stay within range
    sign = -1.0 if style.lightness > 0.5 else 1.0
    luminance = np.clip(style.lightness + sign * TEXTURE * (wave + 0.5), 0, 1)
    return np.repeat(luminance[..., None], 3, axis=2)


def _draw(canvas: np.ndarray, thing: Thing, scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    distance = signed_distance(thing.shape, x + 0.5 - thing.x, y + 0.5 - thing.y, thing.radius)
    inside = np.clip(0.5 - distance, 0, 1)[..., None]
    if scene.style.outline:
        line = 0.03 if scene.style.tone != "dark" else 0.97
        around = np.clip(0.5 - (distance - OUTLINE), 0, 1)[..., None]
        canvas = canvas * (1 - around) + line * around
    return canvas * (1 - inside) + rgb(thing.color, scene.style.saturation) * inside


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of SIZE x SIZE pixels."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    canvas = _background(scene, x, y)
    for thing in scene.things:
        canvas = _draw(canvas, thing, scene, x, y)
    return Image.fromarray((canvas * 255 + 0.5).astype(np.uint8))
