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
from diffpref.captions.oracle import OracleCaptioner
from diffpref.captions.rules import RulePerturber

CAPTIONERS: dict[str, type[Captioner]] = {"oracle": OracleCaptioner}
PERTURBERS: dict[str, type[Perturber]] = {"rules": RulePerturber}

__all__ = [
    "CAPTIONERS",
    "LEVELS",
    "PERTURBERS",
    "Captioned",
    "Captioner",
    "Edit",
    "Level",
    "OracleCaptioner",
    "Perturbed",
    "Perturber",
    "Provenance",
    "RulePerturber",
]
