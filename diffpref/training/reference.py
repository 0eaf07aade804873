"""The frozen reference: a copy of the base, the policy with its adapters switched off, or errors taken
before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffpref.training.batches import Batch
from diffpref.training.precision import half_weights
from diffpref.transfer import to_device

Measure = Callable[[nn.Module], tuple[Tensor, Tensor]]
"""Errors of a denoiser on winners and losers of a batch, each fp32 [B]."""


class Reference(Protocol):
    def errors(self, batch: Batch, measure: Measure) -> tuple[Tensor, Tensor]:
        """The reference's errors on winners and losers of `batch`, each fp32 [B], without gradient."""
        ...


class FrozenCopy:
    """For full fine-tuning. Made before the first step; never saved, since the base model's folder holds
    it."""

    def __init__(self, unet: nn.Module, half: torch.dtype | None = None) -> None:
        """half: of mixed precision, in which weights are kept that it would cast at every use."""
        # It is frozen since nothing updates it. Its weights keep the policy's requires_grad: torch picks the
        # kernel of a product by that flag, and another kernel rounds otherwise.
        self.unet = copy.deepcopy(unet, half_weights(unet, half) if half is not None else {})

    def errors(self, batch: Batch, measure: Measure) -> tuple[Tensor, Tensor]:
        return measure(self.unet)


class AdaptersOff:
    """For LoRA: the policy's own UNet without its adapters, at no memory."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet

    def errors(self, batch: Batch, measure: Measure) -> tuple[Tensor, Tensor]:
        self._unet.disable_adapters()
        try:
            return measure(self._unet)
        finally:
            self._unet.enable_adapters()


class CachedErrors:
    """Errors that were taken on the same draws before training: no reference in memory, no forward pass."""

    def __init__(self, errors: Tensor) -> None:
        """errors: fp32 [pairs, draws, 2 (winner, loser)], NaN for draws that the run does not visit."""
        self._errors = errors

    def errors(self, batch: Batch, measure: Measure) -> tuple[Tensor, Tensor]:
        found = self._errors[torch.tensor(batch.pairs), torch.tensor(batch.draws)]
        if bool(found.isnan().any()):
            raise RuntimeError("a draw has no reference error in the cache")  # a bug of ours, told early
        winner, loser = to_device(found, batch.latents.device).unbind(1)
        return winner, loser
