"""The colour of an object by CLIP: its crop, all around it grey, against sentences with ten colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffpref.evaluators.clip import Clip
from diffpref.evaluators.geneval.rules import Detection
from diffpref.evaluators.geneval.words import COLORS

BACKGROUND = "#999"
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


@dataclass(frozen=True)
class ColourNamer:
    """Zero-shot classifier of ten colours, one for each class of objects."""

    clip: Clip
    _classifiers: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def name(self, crops: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        """The colour of each crop of an object of the class that stands at its place in `names`."""
        vectors = self.clip.embed_images(crops)
        return [
            COLORS[int((self.classifier(name) @ vector).argmax())]
            for name, vector in zip(names, vectors, strict=True)
        ]

    def classifier(self, name: str) -> NDArray[np.float32]:
        """[colours, width]: the mean of each colour's sentence vectors, at length one."""
        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            means = self.clip.embed_texts(texts).reshape(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._classifiers[name] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return self._classifiers[name]


def crop_object(image: Image.Image, detection: Detection) -> Image.Image:
    """The detection's box, with everything outside its mask in grey."""
    grey = Image.new("RGB", image.size, BACKGROUND)
    alone = Image.composite(image.convert("RGB"), grey, Image.fromarray(detection.mask))
    left, top, right, bottom = (round(edge) for edge in detection.box)
    return alone.crop((left, top, right, bottom))
