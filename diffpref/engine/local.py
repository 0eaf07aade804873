"""The local engine: units made in this process, or in several that end with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from diffpref.engine.base import Engine, Job, carried
from diffpref.errors import UserError
from diffpref.processes import worker_died

READY, ROWS, ERROR, BUG = range(4)


def run_local(job: Job, units: Sequence[int], progress: Callable[[int], object], engine: Engine) -> None:
    """Make the units here (no workers, at most one GPU), else in spawned processes, each its own GPU."""
    devices = _devices(engine)
    if engine.workers == 0 and len(devices) == 1:
        worker = job.start(devices[0])
        for unit in units:
            for rows in worker(unit):
                progress(rows)
        return
    with _Team(job, devices[: len(units)]) as team:
        team.run(iter(units), progress)


def end_with_parent() -> None:
    """Let this process end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _devices(engine: Engine) -> list[str]:
    """The device of each worker; "" where the job chooses."""
    gpus = 0
    if engine.on_device:
        import torch  # here, since jobs without a model need none of it

        gpus = torch.cuda.device_count()
    workers = engine.workers or max(gpus, 1)
    return [f"cuda:{i % gpus}" if gpus else "" for i in range(workers)]


class _Team:
    """Worker processes, each with a pipe. A context manager: none outlives it."""

    def __init__(self, job: Job, devices: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")  # forking beside threads or CUDA can hang
        self._members: dict[Connection, Any] = {}
        for device in devices:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(job, device, theirs), daemon=True)
            process.start()
            theirs.close()  # else the end of the process would not end the pipe
            self._members[ours] = process

    def __enter__(self) -> _Team:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._members.values():
            process.terminate()
        for process in self._members.values():
            process.join()

    def run(self, units: Iterator[int], progress: Callable[[int], object]) -> None:
        busy = set(self._members)
        while busy:
            for pipe in multiprocessing.connection.wait(list(busy)):
                assert isinstance(pipe, Connection)
                kind, value = self._receive(pipe)
                if kind == ROWS:
                    progress(value)
                elif kind == ERROR:
                    raise value
                elif kind == BUG:
                    raise RuntimeError(f"a worker process failed:\n{value}")
                elif (unit := next(units, None)) is None:
                    busy.remove(pipe)
                else:
                    self._send(pipe, unit)

    def _receive(self, pipe: Connection) -> tuple[int, Any]:
        try:
            message: tuple[int, Any] = pipe.recv()
            return message
        except (EOFError, OSError):
            raise self._death(pipe) from None

    def _send(self, pipe: Connection, unit: int) -> None:
        try:
            pipe.send(unit)
        except OSError:
            raise self._death(pipe) from None

    def _death(self, pipe: Connection) -> UserError:
        process = self._members[pipe]
        process.join()
        return worker_died(process.exitcode, "--workers")


def _serve(job: Job, device: str, pipe: Connection) -> None:
    """A worker process: make the units that come through the pipe."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent answers it
    try:
        worker = job.start(device)
        while True:
            pipe.send((READY, None))
            for rows in worker(pipe.recv()):
                pipe.send((ROWS, rows))
    except BaseException as error:
        known = carried(error) if isinstance(error, Exception) else None
        with contextlib.suppress(OSError):  # the parent is gone, and nobody listens
            pipe.send((ERROR, known) if known else (BUG, traceback.format_exc()))
