"""The console script, `python -m diffpref` and `accelerate launch -m diffpref` enter here."""

import atexit
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

_reported = sys.unraisablehook
_interrupts: list[bool] = []
_codes: list[int] = []


def enter() -> None:
    """Run the command line and exit with its code. Ctrl-C ends it with one line, even during imports."""
    atexit.register(_end)  # the first to be registered runs last
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)  # nothing is at work yet that would want to tidy up
    from diffpref.cli import INTERRUPTED, main

    sys.unraisablehook = _unraisable
    try:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, _interrupt)
        code = main()
    except KeyboardInterrupt:
        _leave()
    except Exception:
        if _interrupts:  # an import that was broken off fails in any way when it is tried again
            _leave()
        raise
    if code == INTERRUPTED:
        _codes.append(code)
        _hush()
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """As Python does, and remember it."""
    del number, frame
    _interrupts.append(True)
    raise KeyboardInterrupt


def _leave(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    del number, frame
    os.write(2, b"interrupted\n")
    os._exit(130)


def _unraisable(unraisable: Any) -> None:
    """An interrupt that met a destructor or a callback would be told and forgotten: it ends the command."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _leave()
    _reported(unraisable)


def _end() -> None:
    """Python replaces the exit code of a process in which an ``exec`` met an interrupt, as imports' may."""
    for code in _codes:
        with suppress(OSError, ValueError):  # a pipe that was closed, or a stream
            sys.stdout.flush()
        os._exit(code)


def _hush() -> None:
    """Libraries that were imported by half log their statistics when the process ends."""
    import logging

    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None


if __name__ == "__main__":
    enter()
