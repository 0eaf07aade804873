"""Weights in the run's precision: those that autocast would cast at every use, and that nothing updates, are
cast once. Their products are the same to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""By train.mixed_precision; "no" has none."""


def half_weights(network: nn.Module, half: torch.dtype) -> dict[int, nn.Parameter]:
    """For a reference that is copied from `network`: by the `id` of each weight that autocast casts, its copy
    in `half`. Copies keep requires_grad, by which torch picks the kernel of a product."""
    return {
        id(weight): nn.Parameter(weight.detach().to(half), weight.requires_grad)
        for module in _products(network)
        for weight in module.parameters(recurse=False)
    }


def cast_frozen(network: nn.Module, half: torch.dtype) -> None:
    """Cast the frozen weights of a policy with adapters, in place.

    Those under a DoRA stay fp32: their norms, which it divides by, are taken in fp32.
    """
    divided = {id(m.base_layer) for m in network.modules() if len(getattr(m, "lora_magnitude_vector", ()))}
    for module in _products(network):
        weights = list(module.parameters(recurse=False))
        if id(module) not in divided and not any(weight.requires_grad for weight in weights):
            module.to(half)


def _products(network: nn.Module) -> Iterator[nn.Module]:
    """The layers whose weights and inputs autocast casts. Norms, which it computes in fp32, are none."""
    for module in network.modules():
        if type(module) in (nn.Linear, nn.Conv2d):
            yield module
