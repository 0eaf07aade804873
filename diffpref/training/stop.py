"""Stopping politely: the first SIGTERM or SIGINT asks for a checkpoint at the next step boundary, the second
kills."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):
    """The run was asked to stop and did, with everything saved that a later run needs."""


class StopRequest:
    """A context manager that turns signals into a flag. Outside the main thread it does nothing."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread: signals are somebody else's business
                break
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped when a stop was asked for."""
        if self.requested:
            raise Stopped

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        print(
            f"\n{name}: stopping at the next safe moment; once more kills the run",
            file=sys.stderr,
            flush=True,
        )
