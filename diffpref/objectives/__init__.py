"""Objectives: from denoising errors of preference pairs to a loss. One paper, one file, one line in
OBJECTIVES.

Dual captions are not an objective: they are a property of the data and work with every one of these.
"""

from __future__ import annotations

from diffpref.objectives.base import Objective, ObjectiveOutput, PairErrors
from diffpref.objectives.dpo import DPO
from diffpref.objectives.mapo import MaPO
from diffpref.objectives.sft import SFT

OBJECTIVES: dict[str, type[SFT] | type[DPO] | type[MaPO]] = {"sft": SFT, "dpo": DPO, "mapo": MaPO}

__all__ = ["DPO", "OBJECTIVES", "SFT", "MaPO", "Objective", "ObjectiveOutput", "PairErrors"]
