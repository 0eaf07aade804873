"""What one forward pass sees: latents, noise, timesteps and text of some pairs, drawn for (seed, step,
pair)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffpref.config import TrainConfig
from diffpref.data.cached import EncodedPairs, LatentPairs
from diffpref.data.sampler import pair_generator
from diffpref.families.base import Conditioning, Family
from diffpref.transfer import to_device

VALIDATION = "validation-"
"""The stream of random numbers of held-out draws."""


@dataclass(frozen=True)
class Batch:
    """B pairs as 2B samples, the B winners first. Winner and loser share timestep and noise.

    latents, noise: fp32 [2B, C, h, w], latents in the denoiser's units. timesteps: int64 [2B].
    """

    pairs: list[int]  # their numbers in the cache
    draws: list[int]  # what their random numbers were drawn for: the step, or a fixed draw
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: Conditioning


def draw_noise(
    seed: int,
    stream: str,
    keys: Sequence[tuple[int, int]],
    shape: Sequence[int],
    timesteps: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Noise fp32 [B, *shape] and timesteps int64 [B], one for each (draw, pair id) of keys.

    stream: "" in training, VALIDATION on held-out draws. timesteps: the lowest and the highest, both
    included.
    """
    low, high = timesteps
    noise = [torch.randn(*shape, generator=pair_generator(seed, f"{stream}noise", *key)) for key in keys]
    steps = [
        torch.randint(low, high + 1, (), generator=pair_generator(seed, f"{stream}timestep", *key))
        for key in keys
    ]
    return torch.stack(noise), torch.stack(steps)


class BatchBuilder:
    """Makes batches from a cache. Every random number is a function of (seed, step, pair id) and drawn on
    the CPU.

    So the draws are the same after a resume, for any number of processes and any split into micro-batches.
    """

    def __init__(
        self, family: Family, cache: EncodedPairs, config: TrainConfig, device: torch.device
    ) -> None:
        self._family, self._cache, self._config, self._device = family, cache, config, device

    def train(self, step: int, pairs: Sequence[int]) -> Batch:
        """Pairs (numbers in the cache, of one size) as optimizer step `step` sees them."""
        return self.visit([step] * len(pairs), pairs)

    def visit(self, draws: Sequence[int], pairs: Sequence[int]) -> Batch:
        """Pairs, each with the random numbers of its own draw."""
        data = self._config.data
        keys = [(draw, self._cache.pair_ids[pair]) for draw, pair in zip(draws, pairs, strict=True)]
        places = None
        if data.crop == "random":
            places = [(self._chance("top", *key), self._chance("left", *key)) for key in keys]
        latents = self._cache.latents(pairs, [self._flips(*key) for key in keys], places)
        mean = latents.mean
        if data.resample_latents:
            noise = torch.stack([self._normal("latent", *key, mean.shape[1:]) for key in keys])
            mean = mean + (0.5 * latents.logvar.clamp(-30.0, 20.0)).exp() * noise.to(mean.device)
        captions = self._cache.captions(pairs)
        if data.prompt_dropout:
            dropped = [self._chance("dropout", *key) < data.prompt_dropout for key in keys]
            captions[torch.tensor(dropped)] = 0  # the empty prompt, for winner and loser together
        return self._batch("", keys, pairs, replace(latents, mean=mean), captions)

    def fixed(self, draw: int, pairs: Sequence[int]) -> Batch:
        """Pairs on held-out draw number `draw`: the latents' means, the same timestep and noise at every
        call."""
        keys = [(draw, self._cache.pair_ids[pair]) for pair in pairs]
        return self._batch(VALIDATION, keys, pairs, self._cache.latents(pairs), self._cache.captions(pairs))

    def _flips(self, draw: int, pair_id: int) -> tuple[bool, bool]:
        """Whether to mirror the winner and the loser."""
        kind = self._config.data.flip
        if kind == "none":
            return (False, False)
        winner = self._chance("flip", draw, pair_id) < 0.5
        return winner, winner if kind == "shared" else self._chance("flip-loser", draw, pair_id) < 0.5

    def _batch(
        self,
        stream: str,
        keys: list[tuple[int, int]],
        pairs: Sequence[int],
        latents: LatentPairs,
        captions: Tensor,
    ) -> Batch:
        """keys: (draw, pair id) of each pair. captions: int64 [B, 2]."""
        train = self._config.train
        noise, timesteps = draw_noise(
            self._config.seed, stream, keys, latents.mean.shape[2:], (train.min_timestep, train.max_timestep)
        )
        original, crop = _winners_first(latents.original), _winners_first(latents.crop)
        sizes = self._family.size_conditioning(original, crop, torch.tensor(latents.size).expand_as(crop))
        text = self._cache.conditioning(captions.T.flatten().tolist())
        return Batch(
            pairs=list(pairs),
            draws=[draw for draw, _ in keys],
            latents=self._family.codec.scale(self._send(_winners_first(latents.mean))),
            noise=self._send(noise).repeat(2, 1, 1, 1),
            timesteps=self._send(timesteps).repeat(2),
            conditioning={name: self._send(value) for name, value in {**text, **sizes}.items()},
        )

    def _send(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self._device)

    def _generator(self, purpose: str, draw: int, pair_id: int) -> torch.Generator:
        return pair_generator(self._config.seed, purpose, draw, pair_id)

    def _normal(self, purpose: str, draw: int, pair_id: int, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._generator(purpose, draw, pair_id))

    def _chance(self, purpose: str, draw: int, pair_id: int) -> float:
        return torch.rand((), generator=self._generator(purpose, draw, pair_id)).item()


def _winners_first(values: Tensor) -> Tensor:
    """[B, 2, ...] -> [2B, ...]."""
    return values.transpose(0, 1).flatten(0, 1)
