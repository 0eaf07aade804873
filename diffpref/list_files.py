"""Lists that people write as text: .csv, .tsv and .jsonl, every row an object."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffpref.errors import UserError
from diffpref.files import LARGEST_LIST, open_text, parse_json, reason_of

_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Rows of a .csv, .tsv or .jsonl file as objects; cells that a line lacks are None.

    Quotes in a .tsv count only where they enclose a whole cell with those inside doubled: published lists
    have prompts that begin with a quoted word and mean it.

    Raises UserError, with the line: not an object, more cells than columns, a quote that is never closed.
    """
    suffix = path.suffix.lower()
    try:
        with open_text(path, LARGEST_LIST) as stream:
            if suffix == ".jsonl":
                return [_object(number, line) for number, line in enumerate(stream, 1) if line.strip()]
            return _named(_by_tabs(stream) if suffix == ".tsv" else _by_commas(stream))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read", why=reason_of(error)) from error


def _object(number: int, line: str) -> dict[str, Any]:
    try:
        entry = parse_json(line)
        if "\\ud" in line.lower():  # half a surrogate pair can be read, but never be written
            json.dumps(entry, ensure_ascii=False).encode()
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"line {number} is not an object")
    return entry


def _by_commas(stream: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(stream, strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def _by_tabs(stream: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(stream, 1):
        yield number, [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")]


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if _QUOTED.fullmatch(cell) else cell


def _named(lines: Iterable[tuple[int, list[str]]]) -> list[dict[str, Any]]:
    """The cells of each line but the first, by the first one's."""
    filled = ((number, cells) for number, cells in lines if cells not in ([], [""]))
    _, names = next(filled, (0, []))
    rows = []
    for number, cells in filled:
        if any(cell.strip() for cell in cells[len(names) :]):  # a text would lose its end unseen
            raise ValueError(
                f"line {number} has more cells than the first line; texts that hold the separator "
                "stand in quotes"
            )
        lacking = [None] * (len(names) - len(cells))
        rows.append(dict(zip(names, [*cells, *lacking], strict=False)))
    return rows
