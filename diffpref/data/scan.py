"""The pass over labels and captions when a table is opened: what is kept, what is dropped, what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffpref.data.schema import (
    HAS_LABEL,
    OTHER_LABEL,
    Captions,
    Columns,
    PairFile,
    caption_columns,
    first_line,
    needed_columns,
)
from diffpref.errors import UserError
from diffpref.texts import LONGEST, VISIBLE

SCAN_BATCH = 8192
NAMED_BAD_ROWS = 1000  # enough to repair by hand; all are counted
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. source: "FILE row N"; reason: one clause."""

    source: str
    reason: str


@dataclass
class TableStats:
    """Counts of a table. `identical` and the images among `bad` grow as pairs are loaded.

    rows = usable + ties + unlabelled + bad captions, where usable includes pairs not yet loaded.
    first_bad names the first NAMED_BAD_ROWS bad rows; bad_reasons counts all of them by reason.
    """

    rows: int = 0
    ties: int = 0
    unlabelled: int = 0
    first_wins: int = 0
    identical: int = 0
    bad: int = 0
    first_bad: list[BadRow] = field(default_factory=list)
    bad_reasons: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """Rows that can be trained on, as far as is known yet."""
        return self.rows - self.ties - self.unlabelled - self.identical - self.bad

    def add_bad(self, row: BadRow) -> None:
        self.bad += 1
        self.bad_reasons[row.reason] += 1
        if len(self.first_bad) < NAMED_BAD_ROWS:
            self.first_bad.append(row)

    def summary(self) -> str:
        return (
            f"{self.rows} rows: {self.kept} kept, {self.ties} ties, {self.unlabelled} without a label, "
            f"{self.identical} of identical images, {self.bad} bad"
        )


@dataclass(frozen=True)
class ScanResult:
    """rows: int64 global row numbers of usable pairs, ascending; first_wins: bool, image 0 is the winner;
    labels: float64, 1 for image 0, 0 for image 1, 0.5 for a tie."""

    rows: np.ndarray[Any, np.dtype[np.int64]]
    first_wins: Mask
    labels: np.ndarray[Any, np.dtype[np.float64]]
    stats: TableStats


def scan(files: Sequence[PairFile], columns: Columns, captions: Captions, ties: bool = False) -> ScanResult:
    """Read labels and captions of all files; ties: whether they count as usable.

    Raises UserError at the first label that is not 0, 0.5 or 1.
    """
    stats = TableStats()
    rows: list[np.ndarray[Any, Any]] = [np.zeros(0, np.int64)]
    labels: list[np.ndarray[Any, Any]] = [np.zeros(0, np.float64)]
    for file in files:
        first_row, done = stats.rows, 0
        for batch in column_batches(file, needed_columns(file, columns, captions)):
            usable, found = _scan_batch(batch, file, done, columns, captions, stats, ties)
            rows.append(np.flatnonzero(usable) + (first_row + done))
            labels.append(found[usable])
            done += batch.num_rows
    joined = np.concatenate(labels)
    return ScanResult(rows=np.concatenate(rows), first_wins=joined == 1, labels=joined, stats=stats)


def column_batches(file: PairFile, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The named columns of a whole file. Raises UserError when it is damaged."""
    try:
        with pq.ParquetFile(file.path, memory_map=True, pre_buffer=False) as parquet:
            yield from parquet.iter_batches(batch_size=SCAN_BATCH, columns=list(wanted), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        raise UserError(
            f"{file.path} cannot be read",
            why=f"the Parquet file is damaged: {first_line(error)}",
            fix="fetch it again",
        ) from error


def _scan_batch(
    batch: pa.RecordBatch,
    file: PairFile,
    first_row: int,
    columns: Columns,
    captions: Captions,
    stats: TableStats,
    keep_ties: bool,
) -> tuple[Mask, np.ndarray[Any, np.dtype[np.float64]]]:
    """(usable, label) of each row of a batch that starts at `first_row` of its file; adds to stats."""
    labelled, labels = read_labels(batch, file.path, first_row, columns)
    ties = labelled & (labels == 0.5)
    wanted = labelled & (keep_ties | ~ties)
    bad = np.zeros(batch.num_rows, np.bool_)
    for name in caption_columns(columns, captions):
        for unusable, what in _unusable(batch.column(name)):
            for row in np.flatnonzero(wanted & ~bad & unusable):
                stats.add_bad(BadRow(f"{file.path} row {first_row + row}", f"{name} is {what}"))
                bad[row] = True
    usable = wanted & ~bad
    stats.rows += batch.num_rows
    stats.ties += int(ties.sum())
    stats.unlabelled += int((~labelled).sum())
    stats.first_wins += int((usable & (labels == 1)).sum())
    return usable, labels


def read_labels(
    batch: pa.RecordBatch, path: Path, first_row: int, columns: Columns
) -> tuple[Mask, np.ndarray[Any, np.dtype[np.float64]]]:
    """(labelled, label of image 0) of each row of a batch that starts at `first_row` of its file.

    Raises UserError at the first label that is not 0, 0.5 or 1 or that label_1 contradicts.
    """
    labelled = _labelled(batch)
    labels = _numbers(batch.column(columns.label_0))
    _check_labels(labels, labelled, path, first_row, columns.label_0)
    if OTHER_LABEL in batch.schema.names and columns.label_0 != OTHER_LABEL:
        other = _numbers(batch.column(OTHER_LABEL))
        _check_other_label(labels, other, labelled, path, first_row, columns.label_0)
    return labelled, labels


def _labelled(batch: pa.RecordBatch) -> Mask:
    """Rows that carry a label: all, unless a has_label column says otherwise (null counts as no)."""
    if HAS_LABEL not in batch.schema.names:
        return np.ones(batch.num_rows, np.bool_)
    return np.nan_to_num(_numbers(batch.column(HAS_LABEL)), nan=0.0) != 0


def _numbers(column: pa.Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A bool, integer or float column as float64; null becomes NaN."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    values: np.ndarray[Any, np.dtype[np.float64]] = pc.fill_null(
        column.cast(pa.float64(), safe=False), np.nan
    ).to_numpy(zero_copy_only=False)
    return values


def _unusable(column: pa.Array) -> list[tuple[Mask, str]]:
    """Captions that are not UTF-8, as careless writers leave them, and blank ones: which, and what is wrong
    with them."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    raw = column.cast(pa.large_binary())
    broken = np.zeros(len(raw), np.bool_)
    try:
        text = raw.cast(pa.large_string())  # which looks at every byte
    except pa.ArrowInvalid:
        broken = np.array([not _is_utf8(value) for value in raw.to_pylist()])
        text = pc.if_else(pa.array(broken), b"", raw).cast(pa.large_string())
    seen: Mask = pc.fill_null(pc.match_substring_regex(text, VISIBLE), False).to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.utf8_length(text), 0).to_numpy(zero_copy_only=False)
    return [
        (broken, "not UTF-8"),
        (~seen, "null or empty"),
        (lengths > LONGEST, f"longer than {LONGEST:,} characters"),
    ]


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


def _check_labels(
    labels: np.ndarray[Any, Any], labelled: Mask, path: Path, first_row: int, name: str
) -> None:
    wrong = labelled & ~np.isin(labels, (0.0, 0.5, 1.0))
    if not wrong.any():
        return
    row = int(np.flatnonzero(wrong)[0])
    value = labels[row]
    if np.isnan(value):
        why = "it is null or NaN"
    elif 0.0 < value < 1.0:
        why = f"it is {value:g}: soft labels are not supported, since no objective here is defined for them"
    else:
        why = f"it is {value:g}, outside 0..1"
    raise UserError(
        f"label '{name}' of {path} row {first_row + row} is not 0, 0.5 or 1",
        why=why,
        fix="write 1 where image 0 is preferred, 0 where image 1 is, 0.5 for a tie; rows without a "
        f"preference can stay with {HAS_LABEL} = false",
    )


def _check_other_label(
    labels: np.ndarray[Any, Any],
    other: np.ndarray[Any, Any],
    labelled: Mask,
    path: Path,
    first_row: int,
    name: str,
) -> None:
    """Pick-a-Pic's label_1 is 1 - label_0: where it is there and says otherwise, nobody knows who won."""
    contradicts = labelled & ~np.isnan(other) & (labels + other != 1.0)
    if contradicts.any():
        row = int(np.flatnonzero(contradicts)[0])
        raise UserError(
            f"labels of {path} row {first_row + row} contradict each other",
            why=f"'{name}' is {labels[row]:g} and '{OTHER_LABEL}' is {other[row]:g}; they must add up to 1",
            fix=f"repair the labels, or drop the column '{OTHER_LABEL}'",
        )
