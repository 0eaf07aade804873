"""Which pairs a step trains on and which random numbers they get: pure functions of (seed, step, pair).

No state is kept, so a resumed run draws exactly what the uninterrupted one would have drawn, on any number of
processes.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch

from diffpref.errors import UserError


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

    def epoch(self, step: int) -> float:
        """Epochs completed when step `step` begins."""
        return step * self.batch_size / self.n


def pair_seed(seed: int, purpose: str, step: int, pair_id: int) -> int:
    """A 64-bit seed, stable across machines, versions and processes: blake2b of the four values.

    purpose keeps streams apart ("noise", "timestep", "latent", "dropout"): the same pair at the same step
    draws independent numbers for each.
    """
    message = f"{seed}\x1f{purpose}\x1f{step}\x1f{pair_id}".encode()
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, person=b"diffpref").digest(), "little")


def pair_generator(seed: int, purpose: str, step: int, pair_id: int) -> torch.Generator:
    """A CPU generator seeded with `pair_seed`: the same numbers whatever device the model is on.

    torch's CPU generator uses the low 32 bits of a seed only: two draws out of k share their numbers with
    probability of about k^2 / 2^33, which is 1 in 8,000 for a batch of 1024. Harmless for noise.
    """
    return torch.Generator(device="cpu").manual_seed(pair_seed(seed, purpose, step, pair_id))


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=pair_generator(seed, "order", epoch, 0))
