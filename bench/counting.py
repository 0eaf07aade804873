"""FLOPs, counted on the networks themselves: two for a multiply-add of matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops_of(call: Callable[[], Any]) -> float:
    """FLOPs of `call`, backward passes in it included; fused attention would not be counted on a CPU, and
    that of torch's own layer for it nowhere."""
    counter = FlopCounterMode(display=False)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return float(counter.get_total_flops())


def forward_flops(call: Callable[[], Any]) -> float:
    with torch.no_grad():
        return flops_of(call)


@dataclass(frozen=True)
class Flops:
    """Of one forward pass: of the UNet and of the VAE's encoder for an image, of the text for a caption.

    Of a pair, two images, by the usual reckoning that a backward pass is two forward passes, one for the
    gradients of activations and one for those of weights, which frozen weights do not need.
    """

    unet: float
    vae: float
    text: float

    @property
    def dpo(self) -> float:
        """Reference forward 2, policy forward 2 and backward 4."""
        return 8 * self.unet

    @property
    def without_reference(self) -> float:
        """MaPO, or DPO on cached reference errors."""
        return 6 * self.unet

    @property
    def lora(self) -> float:
        """DPO of adapters: reference 2, policy forward 2 and backward 2; the adapters' few percent left
        out."""
        return 6 * self.unet

    @property
    def usual(self) -> float:
        """DPO with VAE and text encoder in every step."""
        return self.dpo + 2 * self.vae + self.text
