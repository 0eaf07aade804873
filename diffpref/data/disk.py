"""Files flushed to the disk, and a full disk told in plain words."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from diffpref.errors import UserError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sync_file(path: Path) -> None:
    """Make a file's bytes survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def told_when_disk_is_full(
    what: str, consequence: str, hint: str = " (checkpoint.keep lowers what a run holds)"
) -> Iterator[None]:
    """Turn "no space left" of Python and of safetensors into a UserError; every other error passes
    unchanged."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_no_room(error):
            raise
        raise UserError(
            f"no room on the disk while writing {what}",
            why=f"{error}; {consequence}",
            fix=f"free some space{hint} and run the same command again",
        ) from error


@contextlib.contextmanager
def told_when_refused(what: str, consequence: str) -> Iterator[None]:
    """Turn the system's other errors with files, which end `what`, into a UserError that names the file.

    "No space left" and errors of connections pass unchanged.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _number(error) or _is_no_room(error) or isinstance(error, ConnectionError):
            raise
        raise UserError(
            f"{what} stopped at an error of the system",
            why=str(error),
            fix=f"put it right and run the same command again: {consequence}",
        ) from error


@contextlib.contextmanager
def told_when_not_writable(place: Path) -> Iterator[None]:
    """Turn the system's refusal to write `place` into a UserError; "no space left" passes unchanged."""
    try:
        yield
    except OSError as error:
        if _is_no_room(error):
            raise
        raise UserError(
            f"cannot write {place}",
            why=str(error.strerror or error),
            fix="choose a folder that can be written",
        ) from error


def _is_no_room(error: Exception) -> bool:
    return _number(error) in _NO_ROOM


def _number(error: Exception) -> int | None:
    """The system's number of an error; safetensors wraps it in its text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None
