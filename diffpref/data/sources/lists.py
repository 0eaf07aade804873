"""JSON lines, JSON arrays, CSV and TSV with a row a pair: caption, two image paths, a label."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from diffpref.data.sources.base import (
    BAD_LABEL,
    MALFORMED,
    Candidate,
    Request,
    RowProblem,
    Source,
    Wanted,
    check_opposite,
    image_file,
    image_root,
    name_columns,
    read_label,
)
from diffpref.data.sources.entries import Entry, first_cells, read_entries
from diffpref.errors import UserError, nearest
from diffpref.files import LARGEST_TEXT, open_text, reason_of
from diffpref.texts import shorten

COLUMNS = {
    key: key
    for key in ("caption", "image_0", "image_1", "label_0", "label_1", "preferred", "caption_0", "caption_1")
}
CSV_SUFFIXES = (".csv", ".tsv")
csv.field_size_limit(
    LARGEST_TEXT
)  # of a cell; the limit of 128 KiB would take a long caption for a broken row


def open_jsonl(request: Request) -> Source:
    """JSON lines or an array of objects; the columns are those of the first entries."""
    path = Path(request.place)
    names = {name: None for cells in first_cells(path) for name in cells}
    return _open(request, path, list(names), read_entries)


def open_csv(request: Request) -> Source:
    """Comma- or (.tsv) tab-separated, UTF-8, with a header; quoting as in RFC 4180."""
    path = Path(request.place)
    return _open(request, path, _header(path), read_csv)


def _open(
    request: Request, path: Path, names: list[str], entries: Callable[[Path], Iterator[Entry]]
) -> Source:
    columns = name_columns(request, COLUMNS)
    _check_columns(path, names, columns, request)
    dual = columns["caption_0"] in names and columns["caption_1"] in names
    root = image_root(request, path)

    def read(_: Wanted) -> Iterator[Candidate | int]:
        for entry in entries(path):
            yield _candidate(path.name, entry, columns, dual, root)

    return Source(files={path.name: path}, read=read, dual=dual, key={"columns": columns})


def _check_columns(path: Path, names: list[str], columns: dict[str, str], request: Request) -> None:
    missing = [key for key in ("caption", "image_0", "image_1") if columns[key] not in names]
    missing += [key for key in request.columns if columns[key] not in names and key not in missing]
    if not missing and columns["label_0"] not in names and columns["preferred"] not in names:
        missing = ["label_0"]
    if missing:
        key = missing[0]
        near = nearest(columns[key], names) or "NAME"
        other = " (nor 'preferred')" if key == "label_0" else ""
        raise UserError(
            f"{path} has no column {columns[key]!r}{other}",
            why=f"columns present: {', '.join(names)}" if names else _why_none(path),
            fix=f"name the right column with --columns {key}={near}, or the right --format",
        )


def _why_none(path: Path) -> str:
    """Why a list has no columns: what is wrong with its first row."""
    first = None if path.suffix.lower() in CSV_SUFFIXES else next(read_entries(path), None)
    return f"{first.where}: {first.problem}" if first and first.problem else "it is empty"


def _candidate(file: str, entry: Entry, columns: dict[str, str], dual: bool, root: Path) -> Candidate:
    cells = entry.cells
    try:
        if entry.problem:
            raise RowProblem(MALFORMED, entry.problem)
        label = _label(cells, columns)
        images = tuple(image_file(cells.get(columns[key]), root) for key in ("image_0", "image_1"))
    except RowProblem as error:
        return Candidate(file, entry.row, entry.where, problem=(error.reason, error.text))
    own = (cells.get(columns["caption_0"]), cells.get(columns["caption_1"])) if dual else None
    caption = cells.get(columns["caption"])
    return Candidate(file, entry.row, entry.where, caption, (images[0], images[1]), label, own)


def _label(cells: dict[str, Any], columns: dict[str, str]) -> float:
    """The label of a row from `label_0`, `label_1` and `preferred`, as many as there are. They must agree."""
    label = read_label(cells.get(columns["label_0"]))
    check_opposite(label, read_label(cells.get(columns["label_1"])))
    preferred = _preferred(cells.get(columns["preferred"]), columns)
    if not math.isnan(label) and not math.isnan(preferred) and label != preferred:
        raise RowProblem(BAD_LABEL, f"label_0 is {label:g}, but preferred is {cells[columns['preferred']]!r}")
    return preferred if math.isnan(label) else label


def _preferred(value: Any, columns: dict[str, str]) -> float:
    """`preferred` names the better image, by number (0 or 1) or by column, or is "tie"; empty: no label."""
    text = "" if value is None else str(value).strip()
    known = {
        "": math.nan, "0": 1.0, "1": 0.0, "0.0": 1.0, "1.0": 0.0, "tie": 0.5, "image_0": 1.0, "image_1": 0.0,
        columns["image_0"]: 1.0, columns["image_1"]: 0.0,
    }  # fmt: skip
    if isinstance(value, bool) or text not in known:
        raise RowProblem(BAD_LABEL, f"preferred is {shorten(value)}, not 0, 1, image_0, image_1 or tie")
    return known[text]


def read_csv(path: Path) -> Iterator[Entry]:
    """Rows behind the header. One that has too few or too many cells, or breaks the quoting, is a problem."""
    with _open_csv(path) as stream:
        reader = csv.reader(_Lines(stream), dialect=_dialect(path), strict=True)
        try:
            header = next((cells for cells in reader if cells), [])
        except csv.Error:
            return
        row = 0
        while True:
            first_line = reader.line_num + 1
            cells, problem = _next_cells(reader)
            if cells is None:
                return
            if not cells and not problem:  # an empty line
                continue
            if not problem and len(cells) != len(header):
                problem = f"{len(cells)} cells instead of {len(header)}"
            if not problem and not _is_utf8(cells):
                problem = "the row is not UTF-8"
            # a quote that is never closed takes many lines along
            last = reader.line_num if problem else first_line
            lines = f"line {first_line}" if last <= first_line else f"lines {first_line} to {last}"
            where = f"row {row} ({lines})"
            yield Entry(row, where, {} if problem else dict(zip(header, cells, strict=True)), problem)
            row += 1


def _next_cells(reader: Iterator[list[str]]) -> tuple[list[str] | None, str]:
    """The next row and what is wrong with it; None at the end. After an error the reader goes on."""
    try:
        return next(reader), ""
    except StopIteration:
        return None, ""
    except csv.Error as error:
        return [], f"broken CSV: {error}"


def _header(path: Path) -> list[str]:
    with _open_csv(path) as stream:
        try:
            rows = csv.reader(_Lines(stream), dialect=_dialect(path), strict=True)
            names = next((cells for cells in rows if cells), [])
        except csv.Error as error:
            raise UserError(f"the header of {path} cannot be read", why=str(error)) from error
    if not _is_utf8(names) or any("\0" in name for name in names):
        raise UserError(f"{path} is not UTF-8", why="its header is not", fix="save it as UTF-8")
    repeated = [name for name, group in itertools.groupby(sorted(names)) if len(list(group)) > 1]
    if repeated:
        raise UserError(f"{path} has the column {repeated[0]!r} twice", fix="rename one in the header")
    return names


class _Lines:
    """Lines of a text; csv.Error for one that is too long, the rest of which is passed over."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(LARGEST_TEXT)
        if not line:
            raise StopIteration
        if len(line) == LARGEST_TEXT and not line.endswith("\n"):
            while (rest := self._stream.readline(LARGEST_TEXT)) and not rest.endswith("\n"):
                pass
            raise csv.Error(f"the line is longer than {LARGEST_TEXT} characters")
        return line


def _open_csv(path: Path) -> TextIO:
    """Bytes that are no UTF-8 pass as lone surrogates: the row that holds them is bad, not the file."""
    try:
        return open_text(path, errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path} cannot be read", why=reason_of(error)) from error


def _dialect(path: Path) -> str:
    return "excel-tab" if path.suffix.lower() == ".tsv" else "excel"


def _is_utf8(cells: Iterable[str]) -> bool:
    try:
        for cell in cells:
            cell.encode()
    except UnicodeEncodeError:
        return False
    return True
