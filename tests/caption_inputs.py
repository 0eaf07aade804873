"""Pictures and prompts for captioners, without the imports that models take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

PROMPTS = Path(__file__).parent / "data/prompts.txt"


def pictures(count: int) -> list[Image.Image]:
    """Different smooth pictures of different sizes."""
    found = []
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        size = (40, 24 + 8 * (seed % 3))
        found.append(Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR))
    return found


def prompts(count: int) -> list[str]:
    """Messy prompts of very different lengths."""
    return PROMPTS.read_text(encoding="utf-8").splitlines()[:count]
