"""Where things lie on disk, hashes of what they hold, and writes that never leave half a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from diffpref.errors import UserError, nearest

PACKAGE = Path(__file__).resolve().parent
TINY_PREFIX = "tiny:"
TINY_ASSETS = PACKAGE / "tiny" / "assets"


def resolve(spec: str) -> Path | str:
    """The path that `spec` means, or `spec` itself when it is no path (it may be a hub id, "org/name").

    "tiny:REST" is a path inside the assets that ship with the package; "~" is the home folder.
    """
    if spec.startswith(TINY_PREFIX):
        return TINY_ASSETS / spec.removeprefix(TINY_PREFIX)
    path = Path(spec).expanduser()
    return path if spec and path.exists() else spec


def resolve_existing(spec: str, what: str) -> Path:
    """The path that `spec` means. Raises UserError when nothing is there; `what` names it ("model")."""
    path = resolve(spec)
    if isinstance(path, Path) and path.exists():
        return path
    raise UserError(
        f"{what} not found: {spec!r}",
        why="the name is empty" if not spec else _why_missing(Path(path).expanduser()),
        fix=_neighbour_hint(spec, Path(path).expanduser()),
    )


def resolve_or_hub_id(spec: str, what: str) -> Path | str:
    """The existing path that `spec` means, or `spec` when it looks like a hub id; else raises UserError."""
    place = resolve(spec)
    looks_like_hub_id = spec.count("/") == 1 and not spec.startswith((".", "/", "~"))
    if isinstance(place, str) and looks_like_hub_id:
        return place
    return resolve_existing(spec, what)


def _why_missing(path: Path) -> str:
    """Name the first part of the path that does not exist."""
    for folder in reversed(path.parents):
        if not folder.exists():
            return f"the folder {folder} does not exist"
    return f"{path.parent.resolve()} holds nothing called {path.name!r}"


def _neighbour_hint(spec: str, path: Path) -> str:
    """Point at a name in the same folder that looks like the one asked for."""
    if spec and path.parent.is_dir():
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
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fchmod(stream.fileno(), _mode_of(path))
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def _mode_of(path: Path) -> int:
    """Permissions to give: those the file has, else the usual ones (mkstemp's are private to the user)."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mode & 0o777
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
