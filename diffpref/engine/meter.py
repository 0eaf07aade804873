"""Progress over rows: a bar on a terminal, and a line a minute in a log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger("diffpref")
LOG_EVERY = 60.0


class Meter:
    """Rows done of `total`, with rate and time left. A context manager.

    done: rows that an earlier run has done; they count, but not for the rate.
    """

    def __init__(self, name: str, total: int, done: int = 0, unit: str = "row") -> None:
        self._name, self._unit, self.total, self.done, self.new = name, unit, total, done, 0
        self._start = self._told = time.monotonic()
        self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, file=sys.stderr, disable=None)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def add(self, rows: int) -> None:
        self.done += rows
        self.new += rows
        self._bar.update(rows)
        if self._bar.disable and time.monotonic() - self._told >= LOG_EVERY:
            self._told = time.monotonic()
            log.info("%s", self)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def __str__(self) -> str:
        rate = self.new / max(self.seconds, 1e-9)
        left = tqdm.format_interval((self.total - self.done) / rate) if rate else "?"
        return (
            f"{self._name}: {self.done:,} of {self.total:,} {self._unit}s, "
            f"{rate:,.2f} {self._unit}s/s, {left} left"
        )
