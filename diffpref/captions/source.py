"""The pairs that are captioned: all columns of some Parquet files, as record batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.data.scan import column_batches, read_labels
from diffpref.data.schema import (
    Columns,
    PairFile,
    check_groups,
    check_schema,
    find_files,
    first_line,
    needed_columns,
    open_file,
)
from diffpref.errors import UserError

OPTION = "--columns.{} {}"


class Slice(NamedTuple):
    """Consecutive rows of one file. row: of the first, counted through all files; place: within its file."""

    batch: pa.RecordBatch
    path: Path
    row: int
    place: int

    def where(self, offset: int) -> str:
        """How messages name a row: "FILE row N"."""
        return f"{self.path.name} row {self.place + offset}"


@dataclass(frozen=True)
class PairSource:
    """Files of one schema, their rows counted through. limit: use only the first so many rows; 0: all."""

    files: tuple[PairFile, ...]
    limit: int = 0

    @property
    def rows(self) -> int:
        rows = sum(file.rows for file in self.files)
        return min(rows, self.limit) if self.limit else rows

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns. What pandas or datasets wrote about them would not fit any more."""
        return self.files[0].schema.remove_metadata()

    @cached_property
    def starts(self) -> list[int]:
        """Row at which each file starts, and one past the last row."""
        return [int(start) for start in np.cumsum([0, *(file.rows for file in self.files)])]

    def check_labels(self, columns: Columns) -> None:
        """Read the labels of all rows. Raises UserError at the first that is not 0, 0.5 or 1."""
        for file in self.files:
            place = 0
            for batch in column_batches(file, needed_columns(file, columns, "shared")):
                read_labels(batch, file.path, place, columns)
                place += batch.num_rows


def open_source(pairs: str, columns: Columns, limit: int = 0) -> PairSource:
    """Open a file, a folder, a glob or tiny:FILE of Parquet pairs.

    Raises UserError: nothing there, not Parquet, a column missing or of the wrong type, files with different
    columns, no row.
    """
    files = tuple(open_file(path.resolve()) for path in find_files(pairs))
    for file in files:
        check_schema(file, columns, "shared", option=OPTION)
        check_groups(file)
        if not file.schema.equals(files[0].schema):
            raise UserError(
                f"{file.path} has other columns than {files[0].path}",
                why=_difference(files[0].schema, file.schema),
                fix="caption them one by one, into a folder each",
            )
    source = PairSource(files, limit)
    if source.rows == 0:
        raise UserError(f"no rows in {pairs}", fix="give a file that holds pairs")
    return source


def _difference(first: pa.Schema, other: pa.Schema) -> str:
    for name in [*first.names, *(name for name in other.names if name not in first.names)]:
        kinds = [_kind(schema, name) for schema in (first, other)]
        if kinds[0] != kinds[1]:
            return f"'{name}': {kinds[0]} there, {kinds[1]} here"
    return "their order differs"


def _kind(schema: pa.Schema, name: str) -> str:
    """What a column holds, "missing" where there is none; a name may stand for several."""
    found = [schema.field(place) for place in schema.get_all_field_indices(name)]
    kinds = [str(field.type) if field.nullable else f"{field.type} without nulls" for field in found]
    return " and ".join(kinds) or "missing"


class SliceReader:
    """Reads ranges of rows in ascending order without reading anything twice; going back costs a row group.

    Not for concurrent threads.
    """

    def __init__(self, source: PairSource, most: int) -> None:
        """most: rows of a slice, and of what is decoded of the Parquet file at once."""
        self._source, self._most = source, most
        self._stream: Iterator[Slice] = iter(())
        self._rest: Slice | None = None
        self._end = -1  # row after the last one that the stream gave; -1: there is no stream

    def read(self, start: int, stop: int) -> Iterator[Slice]:
        """Rows start..stop-1. Raises UserError when a file is damaged there."""
        if not 0 <= self._position() <= start or self._group_after(self._position(), start):
            self._stream, self._rest = self._open(start), None
        while start < stop:
            found = self._rest or next(self._stream)
            self._end = found.row + found.batch.num_rows
            first, last = max(start - found.row, 0), min(stop - found.row, found.batch.num_rows)
            self._rest = _cut(found, last, found.batch.num_rows) if last < found.batch.num_rows else None
            if first < last:
                start = found.row + last
                yield _cut(found, first, last)

    def _position(self) -> int:
        """Row that the stream gives next."""
        return self._rest.row if self._rest else self._end

    def _group_after(self, position: int, start: int) -> bool:
        """Whether a row group starts after `position` and not after `start`: then reading on is a waste."""
        file, group = self._locate(start)
        return self._source.starts[file] + sum(self._source.files[file].group_rows[:group]) > position

    def _locate(self, row: int) -> tuple[int, int]:
        """(file, row group) of a row."""
        file = int(np.searchsorted(self._source.starts, row, side="right")) - 1
        ends = np.cumsum(self._source.files[file].group_rows)
        return file, int(np.searchsorted(ends, row - self._source.starts[file], side="right"))

    def _open(self, start: int) -> Iterator[Slice]:
        """All slices from the row group of `start` on."""
        first, group = self._locate(start)
        for number, file in enumerate(self._source.files[first:], first):
            place = sum(file.group_rows[:group])
            try:
                with pq.ParquetFile(file.path, memory_map=True, pre_buffer=False) as parquet:
                    groups = list(range(group, len(file.group_rows)))
                    for batch in parquet.iter_batches(self._most, row_groups=groups, use_threads=False):
                        yield Slice(batch, file.path, self._source.starts[number] + place, place)
                        place += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"{file.path} cannot be read near row {place}",
                    why=f"the Parquet file is damaged: {first_line(error)}",
                    fix="fetch or write the file again",
                ) from error
            group = 0


def _cut(found: Slice, first: int, last: int) -> Slice:
    """Rows first..last-1 of a slice."""
    return Slice(found.batch.slice(first, last - first), found.path, found.row + first, found.place + first)
