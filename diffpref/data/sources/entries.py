"""Objects of a JSON array or of JSON lines, streamed, each with its place in the file."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from diffpref.data.sources.json_stream import LONGEST, JsonError, read_array
from diffpref.errors import UserError
from diffpref.files import check_depth, open_file, reason_of
from diffpref.texts import shorten

PEEKED = 20
"""Entries that are looked at to tell which format and which columns a file has."""
LINE_SUFFIXES = (".jsonl", ".ndjson")
_CHUNK = 2**16
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Entry:
    """One row of a list: its number from 0, how messages call it, its cells, or why it has none."""

    row: int
    where: str
    cells: dict[str, Any]
    problem: str = ""


def read_entries(path: Path) -> Iterator[Entry]:
    """Entries of a .json array or of JSON lines; the first character says which it is.

    An entry that is no object has a `problem`, and so has a line that is no JSON. Raises UserError where an
    array is damaged, since nothing tells where the next entry begins, and when the file cannot be read.
    """
    try:
        with open_file(path) as stream:
            is_array = _is_array(stream, path)
            stream.seek(0)
            yield from (_from_array if is_array else _from_lines)(stream, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read", why=reason_of(error)) from error


def _is_array(stream: BinaryIO, path: Path) -> bool:
    """Whether the file is one array: it begins with "[", and no line of its first ones proves a file of JSON
    lines, whose first is damaged: an object with nothing behind that would go on with an array."""
    start = stream.read(_CHUNK).removeprefix(_BOM).lstrip()
    if not start.startswith(b"[") or path.suffix.lower() not in LINE_SUFFIXES:
        return start.startswith(b"[")
    stream.seek(0)
    lines = [stream.readline(LONGEST) for _ in range(2 * PEEKED)]
    filled = [line.strip() for line in lines if line.strip()]
    cut_off = lines[-1] or filled[0].endswith((b"[", b","))  # an array may be, too
    following = [*filled[2:], b"," if cut_off else b""]
    return not any(
        line.startswith(b"{") and after[:1] not in (b",", b"]", b"}") and not _parsed(0, "", line).problem
        for line, after in zip(filled[1:], following, strict=False)
    )


def first_cells(path: Path) -> list[dict[str, Any]]:
    """Cells of the first PEEKED entries that are objects."""
    with_cells = (entry.cells for entry in read_entries(path) if not entry.problem)
    return list(itertools.islice(with_cells, PEEKED))


def _from_array(stream: BinaryIO, path: Path) -> Iterator[Entry]:
    row = 0
    try:
        for value in read_array(_decoded(stream)):
            yield _entry(row, f"row {row}", value)
            row += 1
    except (JsonError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged behind its first {row:,} rows", why=str(error), fix="fetch the file again"
        ) from error


def _decoded(stream: BinaryIO) -> Iterator[str]:
    """Text of the file, a chunk at a time; raises UnicodeDecodeError."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while chunk := stream.read(_CHUNK):
        if text := decoder.decode(chunk):
            yield text
    if text := decoder.decode(b"", True):
        yield text


def _from_lines(stream: BinaryIO, path: Path) -> Iterator[Entry]:
    del path
    row = 0
    for number in itertools.count(1):
        line = stream.readline(LONGEST)
        if not line:
            return
        too_long = len(line) == LONGEST and not line.endswith(b"\n")
        while too_long and (rest := stream.readline(LONGEST)) and not rest.endswith(b"\n"):
            pass
        line = (line.removeprefix(_BOM) if number == 1 else line).strip()
        if not line:
            continue
        where = f"row {row} (line {number})"
        if too_long:
            yield Entry(row, where, {}, f"the line is longer than {LONGEST} bytes")
        else:
            yield _parsed(row, where, line)
        row += 1


def _parsed(row: int, where: str, line: bytes) -> Entry:
    try:
        return _entry(row, where, json.loads(line.decode()))
    except UnicodeDecodeError:
        return Entry(row, where, {}, "the line is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Entry(row, where, {}, f"the line is no JSON: {error}")


def _entry(row: int, where: str, value: Any) -> Entry:
    try:
        check_depth(value)
    except ValueError as error:
        return Entry(row, where, {}, str(error))
    if isinstance(value, dict):
        return Entry(row, where, value)
    return Entry(row, where, {}, f"{shorten(value)} is no object")
