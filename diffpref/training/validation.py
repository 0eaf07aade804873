"""How the policy does on held-out pairs: the same pairs, timesteps and noise at every measurement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffpref.config import TrainConfig
from diffpref.families.base import Family
from diffpref.objectives.base import Objective, PairErrors
from diffpref.training.batches import Batch, BatchBuilder
from diffpref.training.pair_errors import pair_errors
from diffpref.training.policy import uncompiled

AUTO_BATCH = 4  # pairs measured together while the largest micro-batch is not known yet


@dataclass(frozen=True)
class _Draw:
    pairs: list[int]
    draw: int
    ref_w: Tensor
    ref_l: Tensor


class Validation:
    """Held-out measurement. The base model's errors are taken once, at the start, so that any objective has
    them.

    Make it while `unet` still is the base model (its adapters, if any, at their start, where they change
    nothing). Each process measures its share of the pairs.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        batches: BatchBuilder,
        sizes: Tensor,
        unet: nn.Module,
        accelerator: Accelerator,
        together: bool,
    ) -> None:
        """sizes: int64 [pairs, 2], (height, width) of each pair of the held-out cache. together: a forward
        pass needs all processes, so that those with fewer pairs repeat one."""
        self._family, self._batches, self._accelerator = family, batches, accelerator
        self._train = config.train
        wanted = config.train.micro_batch
        local = max(1, config.train.batch_size // accelerator.num_processes)
        size = min(local, AUTO_BATCH) if wanted == "auto" else int(wanted) or local
        kept = min(len(sizes), config.validation.pairs)
        world = accelerator.num_processes
        shares = [_batches(range(rank, kept, world), sizes, size) for rank in range(world)]
        mine = shares[accelerator.process_index]
        missing = max(map(len, shares)) - len(mine) if together else 0
        self._repeated, self._idle = shares[0][0], missing * config.validation.draws
        self._draws: list[_Draw] = []
        for draw in range(config.validation.draws):
            for some in mine:
                winner, loser = self._errors(batches.fixed(draw, some), unet)
                self._draws.append(_Draw(some, draw, winner, loser))
        self._keep_pace(unet)

    @torch.no_grad()
    def measure(self, policy: nn.Module, objective: Objective) -> dict[str, float]:
        """Means over all pairs and draws: loss, errors, gains, margin, implicit accuracy.

        `pair_accuracy` averages a pair's margin over its draws before it is compared with 0: less noisy than
        `implicit_accuracy`, which counts each draw apart, as training rows do.
        """
        sums: dict[str, Tensor] = {}
        margins: dict[int, Tensor] = {}
        for item in self._draws:
            winner, loser = self._errors(self._batches.fixed(item.draw, item.pairs), policy)
            output = objective(PairErrors(winner, loser, item.ref_w, item.ref_l))
            for name, value in {"loss": output.loss, **output.metrics}.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.sum()
            for pair, margin in zip(item.pairs, output.metrics["margin"], strict=True):
                margins[pair] = margins.get(pair, torch.zeros_like(margin)) + margin
        self._keep_pace(policy)
        if not self._draws:  # fewer pairs than processes: this one adds zeros under the same names
            none = torch.zeros(0, device=self._accelerator.device)
            output = objective(PairErrors(none, none, none, none))
            sums = {name: value.sum() for name, value in {"loss": output.loss, **output.metrics}.items()}
        return self._means(sums, margins)

    def _keep_pace(self, unet: nn.Module) -> None:
        for _ in range(self._idle):
            self._errors(self._batches.fixed(0, self._repeated), unet)

    def _means(self, sums: dict[str, Tensor], margins: dict[int, Tensor]) -> dict[str, float]:
        device = self._accelerator.device
        per_pair = torch.stack(list(margins.values())) if margins else torch.zeros(0, device=device)
        draws = torch.tensor(float(sum(len(item.pairs) for item in self._draws)), device=device)
        right = ((per_pair.sign() + 1) / 2).sum()
        names = sorted(sums)
        packed = torch.stack(
            [*(sums[name] for name in names), right, draws, torch.full_like(draws, len(per_pair))]
        )
        *totals, right_total, draw_total, pair_total = self._accelerator.reduce(packed, "sum").tolist()
        means = {name: total / draw_total for name, total in zip(names, totals, strict=True)}
        return {**means, "pair_accuracy": right_total / pair_total}

    @torch.no_grad()
    def _errors(self, batch: Batch, unet: nn.Module) -> tuple[Tensor, Tensor]:
        with uncompiled(self._train):
            errors = pair_errors(self._family, batch, unet, None, self._accelerator.autocast)
        return errors.policy_w, errors.policy_l


def _batches(pairs: Iterable[int], sizes: Tensor, batch: int) -> list[list[int]]:
    """Pairs of one size together, at most `batch` of them."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for pair in pairs:
        by_size.setdefault(tuple(sizes[pair].tolist()), []).append(pair)
    return [same[start : start + batch] for same in by_size.values() for start in range(0, len(same), batch)]
