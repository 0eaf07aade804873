"""Supervised fine-tuning on the winners: the baseline of the Diffusion-DPO, MaPO and DCPO papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffpref.objectives.base import ObjectiveOutput, PairErrors, pair_metrics


@dataclass(frozen=True)
class SFT:
    """Fine-tuning on the winners alone: loss L_w.

    The simplified DDPM loss (arXiv 2006.11239, eq. 14) of the preferred image. The loser is looked at for the
    metrics only. Needs no reference; with one, gains, margin and implicit accuracy are reported as well.
    """

    needs_reference: ClassVar[bool] = False

    def __call__(self, errors: PairErrors) -> ObjectiveOutput:
        return ObjectiveOutput(loss=errors.policy_w, metrics=pair_metrics(errors))
