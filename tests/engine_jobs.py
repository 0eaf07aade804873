"""A job for the engines, in a module of its own so that worker processes can import it."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from diffpref.errors import UserError


class Unpicklable(OSError):
    """As some of libraries are."""

    def __reduce__(self):
        raise TypeError


FAILURES = {
    "full": OSError(errno.ENOSPC, "No space left on device", "unit-2"),
    "refused": Unpicklable(errno.EROFS, "Read-only file system", Path("unit-2")),
    "full, says safetensors": SafetensorError("I/O error: No space left on device (os error 28)"),
    "reset": ConnectionResetError("by peer"),
    "end": EOFError("in the middle"),
}


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
            if self.failure in FAILURES:
                raise FAILURES[self.failure]
            raise ZeroDivisionError("a bug")
        (self.folder / f"unit-{unit}").write_text(str(unit**2))
        yield 4

    def made(self):
        return {path.name: path.read_text() for path in self.folder.glob("unit-*")}
