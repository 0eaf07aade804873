"""Random and sequential access to single rows of many Parquet files in bounded memory.

Some writers put a whole file of images into one row group, so a row group is never held whole: it is
streamed in batches of `BATCH` rows. A cursor keeps the stream of the last row group open; reading onwards
continues it, reading back starts the row group again, and the last few batches stay at hand. What must be in
memory at once is a page: 1,024 rows in files that pyarrow, pandas and datasets write, however many there are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.data.schema import PairFile, first_line
from diffpref.errors import UserError

BATCH = 32
KEPT_BATCHES = 4


class RowReader:
    """Reads rows by their global number: rows of all files counted through, in the order of `files`."""

    def __init__(self, files: Sequence[PairFile]) -> None:
        self._files = files
        self._file_starts = np.cumsum([0, *(file.rows for file in files)])
        self._group_starts: dict[int, np.ndarray[Any, Any]] = {}  # by file
        self._opened: tuple[int, pq.ParquetFile] | None = None  # one file, for all of its row groups
        self._cursor: _Cursor | None = None
        self._batches: OrderedDict[tuple[int, int, int, tuple[str, ...]], pa.RecordBatch] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Open files do not travel to worker processes; each opens its own."""
        return {**self.__dict__, "_opened": None, "_cursor": None, "_batches": OrderedDict()}

    def locate(self, row: int) -> tuple[int, int]:
        """(file index, row within the file) of a global row number."""
        file = int(np.searchsorted(self._file_starts, row, side="right")) - 1
        return file, row - int(self._file_starts[file])

    def describe(self, row: int) -> str:
        file, file_row = self.locate(row)
        return f"{self._files[file].path} row {file_row}"

    def read(self, row: int, columns: Sequence[str]) -> dict[str, Any]:
        """The named cells of one row as Python values. Raises UserError when the file is damaged there."""
        file, file_row = self.locate(row)
        if file not in self._group_starts:
            self._group_starts[file] = np.cumsum([0, *self._files[file].group_rows])
        starts = self._group_starts[file]
        group = int(np.searchsorted(starts, file_row, side="right")) - 1
        number, offset = divmod(file_row - int(starts[group]), BATCH)
        batch = self._batch(file, group, number, tuple(columns), row)
        return {name: batch.column(name)[offset].as_py() for name in columns}

    def _batch(
        self, file: int, group: int, number: int, columns: tuple[str, ...], row: int
    ) -> pa.RecordBatch:
        key = (file, group, number, columns)
        if key in self._batches:
            self._batches.move_to_end(key)
            return self._batches[key]
        cursor = self._cursor
        try:
            if cursor is None or cursor.key != (file, group, columns) or cursor.position > number:
                cursor = self._cursor = _Cursor(self._open(file), (file, group, columns))
            batch = cursor.advance(number)
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
            self._close()
            raise UserError(
                f"{self.describe(row)} cannot be read",
                why=f"the Parquet file is damaged: {first_line(error)}",
                fix="fetch or write the file again",
            ) from error
        self._batches[key] = batch
        if len(self._batches) > KEPT_BATCHES:
            self._batches.popitem(last=False)
        return batch

    def _open(self, file: int) -> pq.ParquetFile:
        """The file, opened once however many row groups it has: its footer names them all."""
        if self._opened is None or self._opened[0] != file:
            self._close()
            parquet = pq.ParquetFile(self._files[file].path, memory_map=True, pre_buffer=False)
            self._opened = (file, parquet)
        return self._opened[1]

    def _close(self) -> None:
        self._cursor = None
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None


class _Cursor:
    """A forward stream of one row group's batches, each of BATCH rows (the last may be shorter)."""

    def __init__(self, parquet: pq.ParquetFile, key: tuple[int, int, tuple[str, ...]]) -> None:
        """key: (file, row group, columns)."""
        self.key = key
        _, group, columns = key
        self.position = 0  # number of the batch that comes next
        self._batches: Iterator[pa.RecordBatch] = parquet.iter_batches(
            batch_size=BATCH, row_groups=[group], columns=list(columns), use_threads=False
        )

    def advance(self, number: int) -> pa.RecordBatch:
        while True:
            batch = next(self._batches)
            self.position += 1
            if self.position > number:
                return batch
