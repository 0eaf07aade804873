"""Tensor files written so that they are whole or absent, and a full disk told in plain words."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diffpref.errors import UserError
from diffpref.paths import sync_folder

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file beside `path`, flush it to the disk, rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.tmp")
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            staged,
            metadata=metadata,
        )
        sync_file(staged)
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make a file's bytes survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def told_when_disk_is_full(what: str, consequence: str) -> Iterator[None]:
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
            fix="free some space (checkpoint.keep lowers what a run holds) and run the same command again",
        ) from error


def _is_no_room(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    found = re.search(r"os error (\d+)", str(error))  # safetensors wraps the error number in its text
    return found is not None and int(found[1]) in _NO_ROOM
