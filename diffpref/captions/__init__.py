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
from diffpref.captions.dipper import DipperPerturber
from diffpref.captions.instruct import TransformersPerturber
from diffpref.captions.oracle import OracleCaptioner
from diffpref.captions.rules import RulePerturber
from diffpref.captions.served import HttpCaptioner, HttpPerturber
from diffpref.captions.vision import TransformersCaptioner

CAPTIONERS: dict[str, type[Captioner]] = {
    "transformers": TransformersCaptioner,
    "http": HttpCaptioner,
    "oracle": OracleCaptioner,
}
PERTURBERS: dict[str, type[Perturber]] = {
    "rules": RulePerturber,
    "dipper": DipperPerturber,
    "transformers": TransformersPerturber,
    "http": HttpPerturber,
}

__all__ = [
    "CAPTIONERS",
    "LEVELS",
    "PERTURBERS",
    "Captioned",
    "Captioner",
    "DipperPerturber",
    "Edit",
    "HttpCaptioner",
    "HttpPerturber",
    "Level",
    "OracleCaptioner",
    "Perturbed",
    "Perturber",
    "Provenance",
    "RulePerturber",
    "TransformersCaptioner",
    "TransformersPerturber",
]
