"""What an objective is: a pure function from denoising errors of pairs to a loss per pair and metrics.

Notation used by all objectives, each a float32 tensor [B]:
L_w, L_l   policy's error on the winner and the loser, mean over C, H, W of (prediction - target)^2
R_w, R_l   the same of the frozen reference
h          (R_w - L_w) - (R_l - L_l), the margin: how much more the policy improved on the winner than on the
loser
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from diffpref.errors import UserError


@dataclass(frozen=True)
class PairErrors:
    """Denoising errors of B pairs, each float32 [B]: mean over C, H, W of (prediction - target)^2.

    policy_w, policy_l carry gradient; ref_w, ref_l never do, and are None together where no reference was
    run. Raises ValueError for another dtype (half precision noise exceeds the margin), another shape than
    [B], or half a reference.
    """

    policy_w: Tensor
    policy_l: Tensor
    ref_w: Tensor | None = None
    ref_l: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.ref_w is None) != (self.ref_l is None):
            raise ValueError("ref_w and ref_l must both be given or both be None")
        for name in ("policy_w", "policy_l", "ref_w", "ref_l"):
            errors = getattr(self, name)
            if errors is None:
                continue
            if errors.dtype != torch.float32:
                raise ValueError(f"{name} must be float32, got {errors.dtype}; take the errors in fp32")
            if errors.ndim != 1 or errors.shape != self.policy_w.shape:
                wanted = list(self.policy_w.shape) if self.policy_w.ndim == 1 else "[B]"
                raise ValueError(
                    f"{name} must have shape {wanted}, an error per pair, got {list(errors.shape)}"
                )

    @property
    def has_reference(self) -> bool:
        return self.ref_w is not None

    def gains(self) -> tuple[Tensor, Tensor]:
        """(R_w - L_w, R_l - L_l), float32 [B] with gradient: positive where the policy beats the reference.

        Raises ValueError without a reference.
        """
        if self.ref_w is None or self.ref_l is None:
            raise ValueError("this objective needs the reference's errors ref_w and ref_l, which are None")
        return self.ref_w.detach() - self.policy_w, self.ref_l.detach() - self.policy_l


@dataclass(frozen=True)
class ObjectiveOutput:
    """loss: float32 [B] with gradient, which the trainer averages. metrics: name -> float32 [B], detached."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """A frozen dataclass of the paper's parameters. Each pair's loss depends on that pair alone."""

    needs_reference: ClassVar[bool]

    def __call__(self, errors: PairErrors) -> ObjectiveOutput: ...


def pair_metrics(errors: PairErrors) -> dict[str, Tensor]:
    """Metrics of any objective, detached float32 [B].

    Always winner_error (L_w) and loser_error (L_l). With a reference also winner_gain (R_w - L_w), loser_gain
    (R_l - L_l), margin (h) and implicit_accuracy (1 where h > 0, 1/2 where h = 0, else 0). A falling
    winner_gain under a growing margin is likelihood displacement.
    """
    with torch.no_grad():
        metrics = {"winner_error": errors.policy_w.detach(), "loser_error": errors.policy_l.detach()}
        if errors.has_reference:
            winner_gain, loser_gain = errors.gains()
            margin = winner_gain - loser_gain
            metrics |= {"winner_gain": winner_gain, "loser_gain": loser_gain, "margin": margin}
            metrics["implicit_accuracy"] = accuracy(margin)
    return metrics


def accuracy(score: Tensor) -> Tensor:
    """float32 [B]: 1 where the score prefers the winner (> 0), 1/2 where it is undecided (= 0), else 0."""
    return (score.detach().sign() + 1) / 2


def saturation(logit: Tensor) -> Tensor:
    """1 - sigmoid(logit), float32 [B]: the pair's share of the largest gradient; near 0 a pair is learnt."""
    return torch.sigmoid(-logit.detach())


def require_positive(objective: str, parameter: str, value: float) -> None:
    """Raise UserError naming the parameter unless `value` is a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise UserError(
            f"objective.{parameter} = {value!r} is not allowed for {objective}",
            why="it must be a finite number above 0",
            fix=f"see the values of --objective.{parameter} in `diffpref train --help`",
        )
