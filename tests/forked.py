"""The command line in processes that start at once: forked from one that has done its imports.

By multiprocessing's fork server, which has run nothing: what has trained cannot fork what trains.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from diffpref import cli
from tests.miniatures import environment

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["diffpref.training.run", "diffpref.scoring", "torch.distributed.fsdp", "tests.miniatures"]
)


Main = Callable[[list[str]], int]


@dataclass(frozen=True)
class Forked:
    """A command that runs. log: what it prints."""

    process: BaseProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self, alone: bool = False) -> None:
        """With SIGKILL, and all that it started, unless alone."""
        with contextlib.suppress(ProcessLookupError):
            (os.kill if alone else os.killpg)(self.pid, signal.SIGKILL)
        self.process.join()

    def wait(self, limit: float = 300) -> int:
        """Its exit code, negative for a signal. After `limit` seconds it is killed."""
        self.process.join(limit)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {limit} s:\n{self.printed()}")
        return self.process.exitcode

    def printed(self) -> str:
        return self.log.read_text()

    def finish(self) -> str:
        """Wait; what it printed. It must have done its work."""
        code = self.wait()
        assert code == 0, self.printed()
        return self.printed()


def start(log: Path, *arguments: Any, main: Main = cli.main, **environ: str) -> Forked:
    """Start `diffpref ARGUMENTS`, in a process group of its own. main: a function to call in its place."""
    words = [str(argument) for argument in arguments]
    process = _context.Process(target=_enter, args=(main, words, log, environment(**environ)))
    process.start()
    while process.is_alive() and os.getpgid(process.pid or 0) != process.pid:
        time.sleep(0.001)  # or a kill would find no group
    return Forked(process, log)


def launch(world: int, log: Path, *arguments: Any, main: Main = cli.main, **environ: str) -> list[Forked]:
    """Start `world` processes of one command on the CPU, as torchrun does on one machine.

    log: each process prints to its own, with its number at the end of the name.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    place |= {"LOCAL_WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    return [
        start(
            log.with_name(f"{log.name}-{rank}"),
            *arguments,
            main=main,
            **{**place, "RANK": str(rank), "LOCAL_RANK": str(rank), **environ},
        )
        for rank in range(world)
    ]


def _enter(main: Main, arguments: list[str], log: Path, environ: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environ)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    sys.exit(main(arguments))
