"""A job for the engines, in a module of its own so that worker processes can import it."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from diffpref.errors import UserError


@dataclass(frozen=True)
class Squares:
    """Unit n is a file with n squared; two steps of 3 and 4 rows. `start` leaves a file a process."""

    folder: Path
    fails_at: int = -1
    failure: str = "mistake"

    def start(self, device):
        assert device == ""
        (self.folder / f"started-{os.getpid()}").touch()
        return self.make

    def make(self, unit):
        yield 3
        if unit == self.fails_at:
            if self.failure == "mistake":
                raise UserError("what happened", "why it did", "what to do")
            if self.failure == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("a bug")
        (self.folder / f"unit-{unit}").write_text(str(unit**2))
        yield 4

    def made(self):
        return {path.name: path.read_text() for path in self.folder.glob("unit-*")}
