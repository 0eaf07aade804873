"""Files that others wrote, read within limits: a list may name a pipe, a device or six gigabytes of zeros.

Every path that a user, a list or a folder names is opened here. What is wrong with one is an OSError with a
`strerror` to show, whatever the system itself would have done: waited for ever, filled the memory or raised
ValueError.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

LARGEST_IMAGE = 256 * 2**20
"""Bytes of an image file that are read: more than the largest image that is decoded takes uncompressed."""
LARGEST_LIST = 2**30
"""Bytes of a list that is held in memory."""
LARGEST_JSON = 2**28
"""Bytes of a JSON document, of which every value is an object in memory."""
LARGEST_TEXT = 16 * 2**20
"""Bytes of a config, a suite, a caption: whatever people write by hand; and of one line of a list."""
DEEPEST = 200
"""Nesting of JSON and TOML: far below where Python's own recursion ends, on every path that a value takes."""


_KEY = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
_DEEP_KEY = re.compile(rf"(?m)(?:^|[\[{{,])[ \t]*{_KEY}(?:[ \t]*\.[ \t]*{_KEY}){{{DEEPEST}}}")


class OutsideError(OSError):
    """A path that leads out of the folder it belongs to."""


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes. Raises OSError for anything else, without ever waiting."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError:  # a null character, a lone surrogate
        raise OSError(errno.EINVAL, "the path is not valid", repr(path)) from None
    stream = os.fdopen(descriptor, "rb") if _is_regular(descriptor) else None
    if stream is None:
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return stream


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def read_file(path: str | Path, largest: int = LARGEST_IMAGE) -> bytes:
    """The bytes of a regular file. Raises OSError, with EFBIG for one of more than `largest` bytes."""
    with open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        data = b"" if size > largest else stream.read(largest + 1)
    if max(size, len(data)) > largest:
        raise _too_large(path, max(size, len(data)), largest)
    return data


def open_text(path: str | Path, largest: int | None = None, errors: str = "strict") -> TextIO:
    """A UTF-8 file to be read line by line, line ends as they are. Raises OSError, as `read_file` does."""
    stream = open_file(path)
    size = os.fstat(stream.fileno()).st_size
    if largest is not None and size > largest:
        stream.close()
        raise _too_large(path, size, largest)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors=errors, newline="")


def _too_large(path: str | Path, size: int, largest: int) -> OSError:
    return OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {largest:,} that are read", str(path))


def read_text(path: str | Path, largest: int = LARGEST_TEXT, errors: str = "strict") -> str:
    """The text of a UTF-8 file without its mark, line ends as "\\n". Raises OSError, UnicodeDecodeError."""
    text = read_file(path, largest).decode("utf-8-sig", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def reason_of(error: Exception) -> str:
    """One clause that says what is wrong with a file: no number of the system's, no name again."""
    return (error.strerror if isinstance(error, OSError) else "") or str(error)


def inside(path: str | Path, root: str | Path) -> str:
    """The real path of `path` below `root`, links followed. Raises OutsideError when it leads out of it.

    Files of a hub's snapshot are links to the blobs beside it, which belong to it.
    """
    try:
        real_root = os.path.realpath(root)
        real = os.path.realpath(os.path.join(real_root, path))
    except ValueError:
        raise OSError(errno.EINVAL, "the path is not valid", repr(path)) from None
    roots = [real_root]
    repository, name = os.path.split(os.path.dirname(real_root))
    if name == "snapshots":
        roots.append(os.path.join(repository, "blobs"))
    if not any(os.path.commonpath((folder, real)) == folder for folder in roots):
        raise OutsideError(errno.EPERM, "it leads out of its folder", str(path))
    return real


def parse_json(text: str | bytes) -> Any:
    """json.loads, which raises ValueError for what is nested too deep, too."""
    return _bounded(text, json.loads)


def parse_toml(text: str) -> dict[str, Any]:
    """tomllib.loads, which raises TOMLDecodeError (a ValueError) for what is nested too deep, too."""
    if _DEEP_KEY.search(text):  # tomllib's memory grows with the square of a dotted key's parts
        raise tomllib.TOMLDecodeError(f"a key is nested deeper than {DEEPEST} levels")
    try:
        return dict(_bounded(text, tomllib.loads))
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:
        raise tomllib.TOMLDecodeError(str(error)) from None


def _bounded(text: Any, parse: Callable[[Any], Any]) -> Any:
    try:
        value = parse(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise ValueError for lists and objects nested deeper than DEEPEST."""
    level = [value]
    for _ in range(DEEPEST):
        level = [item for found in level if isinstance(found, (dict, list)) for item in _items(found)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def _items(found: dict[str, Any] | list[Any]) -> list[Any]:
    items = found.values() if isinstance(found, dict) else found
    return [item for item in items if isinstance(item, (dict, list))]
