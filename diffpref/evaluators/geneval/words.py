"""The words of GenEval: COCO's 80 classes, ten colours, four relations, and their forms in a sentence."""

from __future__ import annotations

import re

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's classes in COCO's order; mouse, remote and keyboard are called what they are, as in GenEval."""

_DETECTORS_NAMES = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "sofa": "couch",
    "tvmonitor": "tv", "aeroplane": "airplane", "motorbike": "motorcycle", "hairdryer": "hair drier",
}  # fmt: skip
_PLURALS = {
    "person": "people", "sheep": "sheep", "skis": "skis", "scissors": "scissors", "broccoli": "broccoli",
    "knife": "knives", "computer mouse": "computer mice",
}  # fmt: skip


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    if name in _PLURALS:
        return _PLURALS[name]
    return name + ("es" if name.endswith(("s", "ch", "sh", "x")) else "s")


def plural_forms(name: str) -> set[str]:
    """How prompts write several of them: proper English, and GenEval's bare s or es ("knifes", "benchs")."""
    return {plural(name), name + ("es" if name.endswith("s") else "s")}


def from_detector(label: str) -> str | None:
    """Our name of a detector's label, or None when it is none of COCO's 80 things."""
    return _BY_LETTERS.get(_letters(label))


def _letters(label: str) -> str:
    return re.sub(r"[^a-z]", "", label.lower())


_BY_LETTERS = {_letters(name): name for name in NAMES} | _DETECTORS_NAMES
