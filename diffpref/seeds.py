"""Seeds of random numbers: pure functions, in a module that needs no torch."""

from __future__ import annotations

import hashlib


def pair_seed(seed: int, purpose: str, step: int, pair_id: int) -> int:
    """A 64-bit seed, stable across machines, versions and processes: blake2b of the four values.

    purpose keeps streams apart ("noise", "timestep", "latent", "dropout"): the same pair at the same step
    draws independent numbers for each.
    """
    message = f"{seed}\x1f{purpose}\x1f{step}\x1f{pair_id}".encode()
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, person=b"diffpref").digest(), "little")
