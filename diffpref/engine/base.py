"""What the engines run: jobs, which travel to workers, and workers, which make units there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

ENGINES = ("local", "ray")

Worker = Callable[[int], Iterator[int]]
"""worker(n) makes unit n; it yields the number of rows done since it last did, at best after every batch."""


class Job(Protocol):
    """Picklable parameters: paths are absolute, models are names."""

    def start(self, device: str) -> Worker:
        """Load what all units share, once in each process.

        device: "cuda:1", say; "" leaves the choice to the job.
        """
        ...


@dataclass(frozen=True)
class Engine:
    """Where units are made.

    name: one of ENGINES. workers: processes, or Ray actors. 0 is one for each GPU if the job runs on_device
    and there are GPUs; else this process alone, with Ray one actor for each CPU of the cluster. More workers
    than GPUs share them in turn.
    """

    name: str = "local"
    workers: int = 0
    on_device: bool = False
