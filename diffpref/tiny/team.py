"""Several processes training one model: under torchrun each works on its share of every batch.

The examples of a batch are a function of the step alone, so any number of processes gives the same run up to
the rounding of sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Team:
    """This process's place among those that torchrun started; a single process is a team of one."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls) -> Team:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls(dist.get_rank(), world)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the team."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()
