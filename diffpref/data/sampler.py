"""Which pairs a step trains on and which random numbers they get: pure functions of (seed, step, pair).

No state is kept, so a resumed run draws exactly what the uninterrupted one would have drawn, on any number of
processes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from diffpref.errors import UserError
from diffpref.seeds import pair_seed


class PairSampler:
    """Batches of pair numbers, every pair once an epoch, in an order of its own each epoch.

    n: number of pairs. batch_size: pairs of one optimizer step over all processes. seed: of the order.
    The batches of all steps laid end to end are the epochs laid end to end, so a batch may cross an epoch's
    end, no pair is left out, and a batch larger than n repeats pairs.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1:
            raise UserError(f"there are no pairs to draw from (n = {n})", fix="check --data.pairs")
        if batch_size < 1:
            raise UserError(f"train.batch_size must be at least 1, got {batch_size}")
        self.n = n
        self.batch_size = batch_size
        self.seed = seed

    def indices(self, step: int) -> torch.Tensor:
        """Pair numbers of optimizer step `step` (from 0): int64 [batch_size], each in 0..n-1."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        position, left = step * self.batch_size, self.batch_size
        parts: list[torch.Tensor] = []
        while left > 0:
            epoch, offset = divmod(position, self.n)
            part = _permutation(self.n, self.seed, epoch)[offset : offset + left]
            parts.append(part)
            position, left = position + len(part), left - len(part)
        return torch.cat(parts)  # a copy: the permutation is cached

    def visits(self, step: int) -> torch.Tensor:
        """How often each pair of step `step` was visited before: int64 [batch_size]."""
        return (step * self.batch_size + torch.arange(self.batch_size)) // self.n

    def epoch(self, step: int) -> float:
        """Epochs completed when step `step` begins."""
        return step * self.batch_size / self.n


class BucketSampler:
    """Batches whose pairs all have the same size: a PairSampler for each size, taken in a random order.

    A step's size is drawn with the probability of its share of the pairs, so that each pair is visited
    equally often in expectation, and within a size every pair once an epoch. With one size it is a
    PairSampler.
    """

    def __init__(self, sizes: torch.Tensor, batch_size: int, seed: int) -> None:
        """sizes: int64 [n, 2], (height, width) of each pair."""
        self.n, self.batch_size, self.seed = len(sizes), batch_size, seed
        # as one number each: unique rows of a million pairs take seconds
        kinds, inverse = torch.unique(sizes[:, 0] * 2**32 + sizes[:, 1], return_inverse=True)
        self._members = [(inverse == kind).nonzero().flatten() for kind in range(len(kinds))]
        self._samplers = [PairSampler(len(members), batch_size, seed) for members in self._members]
        self._ends = np.cumsum([len(members) / self.n for members in self._members])
        self._kinds = np.empty(0, np.int64)

    def indices(self, step: int) -> torch.Tensor:
        """Pair numbers of optimizer step `step` (from 0): int64 [batch_size], all of one size."""
        kind, before = self._locate(step)
        return self._members[kind][self._samplers[kind].indices(before)]

    def visits(self, step: int) -> torch.Tensor:
        """How often each pair of step `step` was visited before: int64 [batch_size]."""
        kind, before = self._locate(step)
        return self._samplers[kind].visits(before)

    def _locate(self, step: int) -> tuple[int, int]:
        """The size of step `step`, and how many steps before it had that size."""
        if len(self._members) == 1:
            return 0, step
        if step >= len(self._kinds):
            # The first draws of a longer sequence are those of a shorter one, so growing changes nothing.
            draws = np.random.default_rng(pair_seed(self.seed, "bucket", 0, 0)).random(2 * step + 1024)
            self._kinds = np.searchsorted(self._ends[:-1], draws, side="right")
        kind = int(self._kinds[step])
        return kind, int((self._kinds[:step] == kind).sum())

    def epoch(self, step: int) -> float:
        """Epochs completed when step `step` begins, in expectation where there are several sizes."""
        return step * self.batch_size / self.n


def repeats(pairs: torch.Tensor, visits: torch.Tensor) -> torch.Tensor:
    """How often each pair of a batch came before in the same batch, from its visits: int64 [batch_size]."""
    unique, inverse = torch.unique(pairs, return_inverse=True)
    first = torch.zeros(len(unique), dtype=visits.dtype)
    return visits - first.scatter_reduce(0, inverse, visits, "amin", include_self=False)[inverse]


def pair_generator(seed: int, purpose: str, step: int, pair_id: int) -> torch.Generator:
    """A CPU generator seeded with `pair_seed`: the same numbers whatever device the model is on.

    torch's CPU generator uses the low 32 bits of a seed only: two draws out of k share their numbers with
    probability of about k^2 / 2^33, which is 1 in 8,000 for a batch of 1024. Harmless for noise.
    """
    return torch.Generator(device="cpu").manual_seed(pair_seed(seed, purpose, step, pair_id))


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=pair_generator(seed, "order", epoch, 0))
