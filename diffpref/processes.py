"""Several processes of one command under accelerate launch or torchrun, and the device that each works on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import timedelta

from diffpref.errors import UserError

WAIT_LIMIT = timedelta(hours=12)  # a process may have the slow blocks while the others wait


@dataclass(frozen=True)
class Processes:
    """This process among `world`. `wait` returns when every process has called it."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    wait: Callable[[], None] = lambda: None

    @property
    def main(self) -> bool:
        return self.rank == 0


ALONE = Processes()
"""The one process of a command that no launcher started."""


def place_in_launch() -> Processes:
    """This process among those that a launcher started, by its word: nobody is joined, and nobody waits.

    Raises UserError when RANK, LOCAL_RANK or WORLD_SIZE is no number.
    """
    try:
        rank, world, local = (
            int(os.environ.get(name) or default)
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
    except ValueError as error:
        raise UserError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers", why=str(error)) from error
    return Processes(rank, world, local) if world > 1 else Processes()


@contextlib.contextmanager
def launched() -> Iterator[Processes]:
    """The processes that the launcher started, joined for the block; one when none did.

    Raises UserError when RANK, WORLD_SIZE and the address of the first process do not fit together.
    """
    place = place_in_launch()
    if place.world == 1:
        yield place
        return
    import torch.distributed as distributed

    try:
        distributed.init_process_group("gloo", rank=place.rank, world_size=place.world, timeout=WAIT_LIMIT)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {place.rank} of {place.world} does not find the others",
            why=str(error).splitlines()[0],
            fix="start it with torchrun or accelerate launch, or unset WORLD_SIZE",
        ) from error
    try:
        yield replace(place, wait=_wait)
    finally:
        distributed.destroy_process_group()


def _wait() -> None:
    import torch.distributed as distributed

    try:
        distributed.barrier()
    except RuntimeError as error:
        raise UserError(
            "another process of this command stopped", why=str(error).splitlines()[0], fix="see its message"
        ) from error


def worker_died(code: int | None, setting: str) -> UserError:
    """The error to raise when a worker process ended before its work. code: its exit code, where there is
    one; setting: what sets the number of workers ("--workers")."""
    ended = "it ended before its work was done" if code is None else f"its exit code is {code}"
    return UserError(
        "a worker process died",
        why=f"{ended}; -9 is what the system gives when memory runs out",
        fix=f"run the same command again, with fewer {setting} if memory was short",
    )


@contextlib.contextmanager
def told_when_a_worker_dies(setting: str) -> Iterator[None]:
    """Turn the end of a process of a pool into a UserError. setting: as in `worker_died`."""
    try:
        yield
    except BrokenProcessPool as error:
        raise worker_died(None, setting) from error


def cpu_is_wanted() -> bool:
    """Whether accelerate was told to use the CPU (ACCELERATE_USE_CPU), whatever else there is."""
    from accelerate.utils import str_to_bool

    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_CPU") or "false"))


def best_device() -> str:
    """cuda, else mps, else cpu; cpu where accelerate was told so."""
    import torch

    if cpu_is_wanted():
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def choose_device(name: str | None, local_rank: int = 0) -> str:
    """The device of this process; without a name the best there is, on CUDA one for each local process.

    Raises UserError when the device cannot be used.
    """
    import torch

    name = name or best_device()
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank % max(1, torch.cuda.device_count())}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name!r} cannot be used", why=str(error).splitlines()[0]) from error
    return name
