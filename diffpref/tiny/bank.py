"""The pretraining data: scene number i, its picture and its captions, as pure functions of (seed, i)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from diffpref.tiny.grammar import PREFIXES, describe, is_held_out, kind_caption
from diffpref.tiny.render import render
from diffpref.tiny.scenes import SHAPES, Scene, sample_scene


@dataclass(frozen=True)
class Example:
    """A scene with two captions: what its kind asks for, and all there is to say."""

    scene: Scene
    captions: tuple[str, str]

    @property
    def image(self) -> Image.Image:
        return render(self.scene)


def example(seed: int, index: int, shapes: tuple[str, ...] = SHAPES) -> Example:
    """Training example number `index`; neither caption is ever a held-out prompt."""
    rng = np.random.default_rng([seed, index])
    while True:
        scene = sample_scene(rng, shapes=shapes)
        brief = kind_caption(scene, rng)
        prefix = PREFIXES[rng.integers(len(PREFIXES))] if rng.random() < 0.5 else ""
        full = prefix + describe(scene.things)
        if not is_held_out(brief) and not is_held_out(full):
            return Example(scene, (brief, full))


def pixels(images: list[Image.Image]) -> np.ndarray:
    """Images as float32 [N, 3, H, W] in [-1, 1]."""
    stack = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return np.ascontiguousarray(stack.transpose(0, 3, 1, 2)) / 127.5 - 1
