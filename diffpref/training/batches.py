"""What one forward pass sees: latents, noise, timesteps and text of some pairs, drawn for (seed, step,
pair)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpref.config import TrainConfig
from diffpref.data.cached import LatentCache
from diffpref.data.sampler import pair_generator
from diffpref.families.base import Conditioning, Family


@dataclass(frozen=True)
class Batch:
    """B pairs as 2B samples, the B winners first. Winner and loser share timestep and noise.

    latents, noise: fp32 [2B, C, h, w], latents in the denoiser's units. timesteps: int64 [2B].
    """

    pair_ids: list[int]
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: Conditioning


class BatchBuilder:
    """Makes batches from a cache. Every random number is a function of (seed, step, pair id) and drawn on
    the CPU.

    So the draws are the same after a resume, for any number of processes and any split into micro-batches.
    """

    def __init__(self, family: Family, cache: LatentCache, config: TrainConfig, device: torch.device) -> None:
        self._family, self._cache, self._config, self._device = family, cache, config, device

    def train(self, step: int, pairs: Sequence[int]) -> Batch:
        """Pairs (numbers in the cache) as optimizer step `step` sees them."""
        data = self._config.data
        ids = [self._cache.pair_ids[pair] for pair in pairs]
        flips = [self._chance("flip", step, pair_id) < 0.5 for pair_id in ids] if data.random_flip else None
        mean, logvar = self._cache.latents(pairs, flips)
        if data.resample_latents:
            draws = torch.stack([self._normal("latent", step, pair_id, mean.shape[1:]) for pair_id in ids])
            mean = mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * draws
        captions = self._cache.captions(pairs)
        if data.prompt_dropout:
            dropped = [self._chance("dropout", step, pair_id) < data.prompt_dropout for pair_id in ids]
            captions[torch.tensor(dropped)] = 0  # the empty prompt, for winner and loser together
        return self._batch(step, "", ids, mean, captions)

    def fixed(self, draw: int, pairs: Sequence[int]) -> Batch:
        """Pairs on held-out draw number `draw`: the latents' means, the same timestep and noise at every
        call."""
        ids = [self._cache.pair_ids[pair] for pair in pairs]
        mean, _ = self._cache.latents(pairs)
        return self._batch(draw, "validation-", ids, mean, self._cache.captions(pairs))

    def _batch(self, step: int, stream: str, ids: list[int], latents: Tensor, captions: Tensor) -> Batch:
        """latents: [B, 2, C, h, w]; captions: int64 [B, 2]."""
        train = self._config.train
        noise = torch.stack(
            [self._normal(f"{stream}noise", step, pair_id, latents.shape[2:]) for pair_id in ids]
        )
        timesteps = torch.stack(
            [
                torch.randint(
                    train.min_timestep,
                    train.max_timestep + 1,
                    (),
                    generator=self._generator(f"{stream}timestep", step, i),
                )
                for i in ids
            ]
        )
        text = self._cache.conditioning(captions.T.flatten().tolist())
        return Batch(
            pair_ids=ids,
            latents=self._family.scale_latents(self._send(latents.transpose(0, 1).flatten(0, 1))),
            noise=self._send(noise).repeat(2, 1, 1, 1),
            timesteps=self._send(timesteps).repeat(2),
            conditioning={name: self._send(value) for name, value in text.items()},
        )

    def _send(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)

    def _generator(self, purpose: str, step: int, pair_id: int) -> torch.Generator:
        return pair_generator(self._config.seed, purpose, step, pair_id)

    def _normal(self, purpose: str, step: int, pair_id: int, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._generator(purpose, step, pair_id))

    def _chance(self, purpose: str, step: int, pair_id: int) -> float:
        return torch.rand((), generator=self._generator(purpose, step, pair_id)).item()
