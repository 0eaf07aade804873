"""Captions for each image of a pair: captioners write them, perturbers make them worse."""

from __future__ import annotations

from diffpref.captions.base import (
    LEVELS,
    Captioned,
    Captioner,
    Edit,
    Level,
    Perturbed,
    Perturber,
    Provenance,
)
from diffpref.captions.rules import RulePerturber

PERTURBERS: dict[str, type[Perturber]] = {"rules": RulePerturber}

__all__ = [
    "LEVELS",
    "PERTURBERS",
    "Captioned",
    "Captioner",
    "Edit",
    "Level",
    "Perturbed",
    "Perturber",
    "Provenance",
    "RulePerturber",
]
