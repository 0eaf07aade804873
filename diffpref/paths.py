"""Where things lie on disk, hashes of what they hold, and writes that never leave half a file."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any, Literal

from diffpref.errors import UserError, nearest

PACKAGE = Path(__file__).resolve().parent
TINY_PREFIX = "tiny:"
TINY_ASSETS = PACKAGE / "tiny" / "assets"
LONGEST_NAME = 255  # bytes, of one file or folder, on nearly every file system
SHOWN = 300  # characters of a path in a message
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # as mkstemp draws them in `atomic_write_bytes`


def resolve(spec: str) -> Path | str:
    """The path that `spec` means, or `spec` itself when it is no path (it may be a hub id, "org/name").

    "tiny:REST" is a path inside the assets that ship with the package; "~" is the home folder.
    """
    if spec.startswith(TINY_PREFIX):
        return TINY_ASSETS / spec.removeprefix(TINY_PREFIX)
    path = home_path(spec)
    return path if spec and os.path.exists(path) else spec


def resolve_existing(spec: str, what: str) -> Path:
    """The path that `spec` means. Raises UserError when nothing is there; `what` names it ("model")."""
    path = resolve(spec)
    if isinstance(path, Path) and os.path.exists(path):
        return path
    raise UserError(
        f"{what} not found: {shown(spec)!r}",
        why="the name is empty" if not spec else _why_missing(home_path(path)),
        fix=_neighbour_hint(spec, home_path(path)),
    )


def shown(path: str | Path) -> str:
    """A path as messages show it: one of thousands of characters would hide what they say."""
    text = str(path)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def home_path(spec: str | Path) -> Path:
    """`spec` with "~" as the home folder; the "~" stays where no user has that name."""
    return Path(os.path.expanduser(spec))


def resolve_or_hub_id(spec: str, what: str) -> Path | str:
    """The existing path that `spec` means, or `spec` when it looks like a hub id; else raises UserError."""
    place = resolve(spec)
    looks_like_hub_id = spec.count("/") == 1 and not spec.startswith((".", "/", "~"))
    if isinstance(place, str) and looks_like_hub_id:
        return place
    return resolve_existing(spec, what)


def _why_missing(path: Path) -> str:
    """Name the first part of the path that does not exist."""
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        return f"a name in it has more than {LONGEST_NAME} bytes, which no file system takes"
    for folder in reversed(path.parents):
        if not os.path.exists(folder):
            return f"the folder {folder} does not exist"
    return f"{path.parent.resolve()} holds nothing called {path.name!r}"


def _neighbour_hint(spec: str, path: Path) -> str:
    """Point at a name in the same folder that looks like the one asked for."""
    if spec and os.path.isdir(path.parent):
        close = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
        if close:
            head = spec[: len(spec) - len(path.name)] if spec.endswith(path.name) else ""
            return f"did you mean {head + close!r}?"
    return "give the path of an existing file or folder; relative paths start at the current folder"


def share_dir(name: Literal["configs", "eval"]) -> Path:
    """The folder of shipped recipes ("configs") or suites ("eval"), in an installed wheel or a checkout."""
    for folder in (PACKAGE / "share" / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise UserError(
        f"the folder {name!r} that ships with diffpref is missing",
        why=f"it is neither in {PACKAGE / 'share'} nor in {PACKAGE.parent}",
        fix="install diffpref again: pip install --force-reinstall diffpref",
    )


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(obj: Any) -> str:
    """SHA-256 (64 hex digits) of `obj` as JSON with sorted keys and no spaces. Raises ValueError for NaN."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, never a part."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes beside `path`, flush them to the disk, then rename over `path`.

    The folder is created. On failure (a full disk, say) the old file stays and the temporary one is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy_once(os.path.abspath(path.parent))
    descriptor, temporary = _locked_temporary(path)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fchmod(stream.fileno(), _mode_of(path))
            os.fsync(stream.fileno())
            os.replace(temporary, path)  # before the file is closed, which unlocks it
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def remove_abandoned(folder: str | Path) -> None:
    """Remove the temporary files of `atomic_write_bytes` that a kill left in `folder`.

    Those of a process that lives are locked by it and stay; where the file system has no locks, all stay.
    """
    with contextlib.suppress(OSError):
        for name in [name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]:
            with contextlib.suppress(OSError):
                _remove_unlocked(os.path.join(folder, name))


def forget_tidied() -> None:
    """Let the next write into each folder look for abandoned files again: a command starts."""
    _tidy_once.cache_clear()


@functools.cache  # a folder of 100,000 images is listed once in a command, not for each image
def _tidy_once(folder: str) -> None:
    remove_abandoned(folder)


def _remove_unlocked(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)  # nothing to wait for in a FIFO
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _locked_temporary(path: Path) -> tuple[int, str]:
    """A new file beside `path`, open and locked for as long as it is open."""
    while True:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(temporary):
            return descriptor, temporary
        os.close(descriptor)  # another process tidied between the two steps


def _mode_of(path: Path) -> int:
    """Permissions to give: those the file has, else the usual ones (mkstemp's are private to the user)."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mode & 0o777
    return new_file_mode()


def new_file_mode() -> int:
    """Permissions that the user's umask gives a new file. Libraries that write through temporary files leave
    0600."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def sync_folder(folder: str | Path) -> None:
    """Make renames inside `folder` survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
