"""AdamW, the learning rate of every step, and a moving average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpref.config import LoopConfig


def learning_rate(step: int, train: LoopConfig) -> float:
    """Learning rate of optimizer step `step` (1..train.steps): a pure function, so a resume needs no state.

    It rises linearly to its peak at step `warmup_steps`; "linear" and "cosine" then fall to 0 after the last.
    """
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    done = (step - 1 - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return train.learning_rate * factor[train.schedule]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def make_optimizer(parameters: Mapping[str, nn.Parameter], train: LoopConfig) -> torch.optim.AdamW:
    """AdamW in one fused kernel (CPU and CUDA)."""
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
    return torch.optim.AdamW(
        list(parameters.values()),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
        fused=fused,
    )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"."""
    return {
        f"{kind}/{name}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Undo `optimizer_tensors`. Step counters stay where a fused kernel wants them, beside the parameters."""
    for name, parameter in parameters.items():
        state: dict[str, Any] = {}
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            state[kind] = tensors[f"{kind}/{name}"].to(parameter.device, copy=True)
        optimizer.state[parameter] = state


class MovingAverage:
    """Exponential moving average of the trained weights, in fp32 beside them.

    decay: weight of the old average; early on min(decay, (1 + step) / (10 + step)), so that the start is
    forgotten.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = dict(parameters)
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = list(self.tensors.values()), [p.detach() for p in self._parameters.values()]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        copy_into(self._parameters, self.tensors)
        try:
            yield
        finally:
            copy_into(self._parameters, own)


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Copy named values in place; names and shapes must be the same on both sides."""
    if targets.keys() != sources.keys():
        differing = sorted(targets.keys() ^ sources.keys())[:3]
        raise ValueError(f"tensors do not match: {', '.join(differing)}")
    for name, target in targets.items():
        target.copy_(sources[name])
