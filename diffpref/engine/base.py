"""What the engines run: jobs, which travel to workers, and workers, which make units there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from diffpref.errors import UserError

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

    def __post_init__(self) -> None:
        require_engine(self.name)
        if self.workers < 0:
            raise UserError(f"--workers must be at least 0, got {self.workers}")


def carried(error: Exception) -> UserError | OSError | None:
    """What a worker's error is in the process that started it; None for a bug, whose traceback travels.

    Errors of the system, which are told where the run was started, are carried as plain ones: subclasses of
    libraries may not be picklable. safetensors has the system's number in its text.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno:
        name = None if error.filename is None else str(error.filename)
        return OSError(error.errno, error.strerror, name)
    found = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return OSError(int(found[1]), str(error)) if found else None


def require_engine(name: str) -> None:
    """Raise UserError naming the engines unless `name` is one of them."""
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}", fix=f"engines: {', '.join(ENGINES)}")


def require_shard(shard: tuple[int, int]) -> None:
    """Raise UserError unless `shard` is (i, n) with i from 0 to n - 1."""
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"--shard {index}/{count} is none", fix="I/N with I from 0 to N - 1, such as 0/4")
