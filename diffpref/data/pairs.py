"""Preference pairs, read lazily from Parquet files.

`open_pairs(spec)` gives a PairTable, `table.load(i)` a PreferencePair.

Opening reads labels and captions only (column by column, batch by batch) and keeps nine bytes a row. Images
are streamed in small batches when a pair is loaded, so memory does not grow with the table or with its row
groups (see reader.py).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from diffpref.data.images import ImageError, decode_image, image_size
from diffpref.data.reader import RowReader
from diffpref.data.scan import BadRow, TableStats, column_batches, scan
from diffpref.data.schema import (
    Captions,
    Columns,
    PairFile,
    PickAPicColumns,
    caption_columns,
    check_groups,
    check_schema,
    find_files,
    open_file,
)
from diffpref.errors import UserError

IDENTICAL = "both images are the same"


@dataclass(frozen=True)
class PreferencePair:
    """One pair after label resolution: winner and loser, each an upright 8-bit RGB image with its caption.

    id: stable 63-bit hash of "<file index>:<row>"; it seeds the pair's noise.
    source: "FILE row N" (N counts from 0), for messages.
    With shared captions both captions are the prompt.
    """

    id: int
    winner_image: Image.Image
    loser_image: Image.Image
    winner_caption: str
    loser_caption: str
    source: str

    def swapped(self) -> PreferencePair:
        """The pair with the preference reversed: images and captions change sides together."""
        return replace(
            self,
            winner_image=self.loser_image,
            loser_image=self.winner_image,
            winner_caption=self.loser_caption,
            loser_caption=self.winner_caption,
        )


def open_pairs(
    spec: str | Path,
    columns: Columns | None = None,
    captions: Captions = "shared",
    max_bad_share: float = 0.01,
    max_pairs: int = 0,
    option: str = "--data.columns.{} {}",
) -> PairTable:
    """Open a file, a folder or a glob of Parquet pairs and check every label and caption.

    max_pairs: use the first so many usable pairs; 0: all. option: as in `check_schema`.

    Ties and rows without a label are dropped and counted. Rows whose captions are null or empty are bad: left
    out, counted and named; so are rows whose images cannot be decoded, found when they are loaded.

    Raises UserError: nothing there, not Parquet, a column missing or of the wrong type, a label that is not
    0, 0.5 or 1, no row, only ties, more than `max_bad_share` (0..1) of all rows bad.
    """
    if not 0.0 <= max_bad_share <= 1.0:
        raise UserError(
            f"max_bad_share must lie in 0..1, got {max_bad_share}", fix="set --data.max_bad_share"
        )
    columns = columns if columns is not None else PickAPicColumns()
    files = [open_file(path) for path in find_files(spec)]
    for file in files:
        check_schema(file, columns, captions, option)
        check_groups(file)
    return PairTable(files, columns, captions, max_bad_share, max_pairs)


class PairTable:
    """The usable pairs of some Parquet files, in order of file name and row. Not safe for concurrent threads.

    Reading in order is streaming; reading at random decodes a row group up to the row asked for.
    """

    def __init__(
        self,
        files: list[PairFile],
        columns: Columns,
        captions: Captions,
        max_bad_share: float,
        max_pairs: int,
    ) -> None:
        self.columns = columns
        self.captions = captions
        self.max_bad_share = max_bad_share
        self._files = files
        self._reader = RowReader(files)
        result = scan(files, columns, captions)
        self.stats: TableStats = result.stats
        last = max_pairs or len(result.rows)
        self.left_out = max(0, len(result.rows) - last)  # usable pairs beyond max_pairs
        self._rows = result.rows[:last]
        self._first_wins = result.first_wins[:last]
        self._problems: dict[int, str] = {}  # index -> why a pair turned out unusable when it was loaded
        if self.stats.rows == 0:
            raise UserError(f"no rows in {self._where()}", fix="give a file that holds pairs")
        self._check_bad_share()
        if len(self) == 0:
            raise UserError(
                f"no usable pair in {self._where()}",
                why=self._why_none(),
                fix=_FIX_ROWS if self.stats.bad else _FIX_LABELS,
            )

    def _why_none(self) -> str:
        first = [f"{row.source}: {row.reason}" for row in self.stats.first_bad[:1]]
        return "; ".join([self.stats.summary(), *first])

    def __len__(self) -> int:
        """Number of pairs with a preference and captions (images are not looked at until loaded)."""
        return len(self._rows)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(file.path for file in self._files)

    def pair_id(self, index: int) -> int:
        """Stable 63-bit id of pair `index`: a hash of "<file index>:<row in that file>"."""
        file, row = self._reader.locate(self._row_of(index))
        return pair_id(file, row)

    def source(self, index: int) -> str:
        """Where pair `index` comes from: "FILE row N"."""
        return self._reader.describe(self._row_of(index))

    def load(self, index: int) -> PreferencePair:
        """Pair `index`, decoded. A bad pair, or one of identical images, is replaced by the next good one.

        The replacement depends on the data alone, never on the order of calls, and carries its own id and
        source. Raises UserError when bad rows exceed max_bad_share of all rows, or when no good pair is left.
        """
        for step in range(len(self)):
            pair = self.try_load((index + step) % len(self))
            if isinstance(pair, PreferencePair):
                return pair
        raise UserError(f"no usable pair in {self._where()}", why=self.stats.summary(), fix=_FIX_IMAGES)

    def try_load(self, index: int) -> PreferencePair | None:
        """Pair `index`, decoded, or None when it is bad or both its images are the same (counted in `stats`).

        Raises UserError when bad rows exceed max_bad_share of all rows.
        """
        row = self._row_of(index)
        if index in self._problems:
            return None
        captions = caption_columns(self.columns, self.captions)
        values = self._reader.read(row, [self.columns.image_0, self.columns.image_1, *captions])
        blobs = (image_bytes(values[self.columns.image_0]), image_bytes(values[self.columns.image_1]))
        if blobs[0] is not None and blobs[0] == blobs[1]:
            self._problems[index] = IDENTICAL
            self.stats.identical += 1
            return None
        images: list[Image.Image] = []
        for name, blob in zip((self.columns.image_0, self.columns.image_1), blobs, strict=True):
            try:
                images.append(decode_image(blob))
            except ImageError as error:
                self._mark_bad(index, row, f"{name}: {error.reason}")
                return None
        texts = [values[name] for name in captions] * (2 if len(captions) == 1 else 1)
        file, file_row = self._reader.locate(row)
        pair = PreferencePair(
            id=pair_id(file, file_row),
            winner_image=images[0],
            loser_image=images[1],
            winner_caption=texts[0],
            loser_caption=texts[1],
            source=self._reader.describe(row),
        )
        return pair if self._first_wins[index] else pair.swapped()

    def image_sizes(self, index: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """(height, width) of both images by their headers; None when one cannot be read. Counts nothing."""
        names = [self.columns.image_0, self.columns.image_1]
        values = self._reader.read(self._row_of(index), names)
        try:
            first, second = (image_size(image_bytes(values[name])) for name in names)
        except ImageError:
            return None
        return first, second

    def group_starts(self) -> list[int]:
        """Index of the first pair of each row group that has one: where reading begins at once."""
        starts = np.cumsum([0, *(rows for file in self._files for rows in file.group_rows)])[:-1]
        found = np.unique(np.searchsorted(self._rows, starts))
        return [int(index) for index in found if index < len(self)]

    def problem(self, index: int) -> str:
        """Why `try_load(index)` gave None: IDENTICAL or what is wrong with an image; "" for a good pair."""
        return self._problems.get(index, "")

    def iter_captions(self, start: int = 0) -> Iterator[tuple[str, str]]:
        """(winner's caption, loser's caption) of each pair from `start` on, streamed; images are not read."""
        names = caption_columns(self.columns, self.captions)
        index, end = start, 0
        for file in self._files:
            begin, end = end, end + file.rows
            if index == len(self) or self._rows[index] >= end:
                continue  # nothing of this file is wanted
            for batch in column_batches(file, names):
                begin += batch.num_rows
                stop = int(np.searchsorted(self._rows, begin))
                if stop > index:
                    chosen = pa.array(self._rows[index:stop] - (begin - batch.num_rows))
                    texts = [batch.column(name).take(chosen).to_pylist() for name in names]
                    wins = self._first_wins[index:stop].tolist()
                    for first, second, first_wins in zip(texts[0], texts[-1], wins, strict=True):
                        yield (first, second) if first_wins else (second, first)
                    index = stop

    def pair_ids(self) -> list[int]:
        """`pair_id` of every pair."""
        starts = np.cumsum([0, *(file.rows for file in self._files)])
        ids: list[int] = []
        for file, (first, last) in enumerate(itertools.pairwise(np.searchsorted(self._rows, starts))):
            ids += [pair_id(file, row) for row in (self._rows[first:last] - starts[file]).tolist()]
        return ids

    def _row_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return int(self._rows[index])

    def _mark_bad(self, index: int, row: int, reason: str) -> None:
        self._problems[index] = reason
        self.stats.add_bad(BadRow(self._reader.describe(row), reason))
        self._check_bad_share()

    def _check_bad_share(self) -> None:
        stats = self.stats
        if stats.bad > self.max_bad_share * stats.rows:
            shown = "; ".join(f"{bad.source}: {bad.reason}" for bad in stats.first_bad[:5])
            more = f"; and {stats.bad - 5} more" if stats.bad > 5 else ""
            raise UserError(
                f"{stats.bad} of {stats.rows} rows in {self._where()} cannot be used, more than the "
                f"share allowed (max_bad_share = {self.max_bad_share:g})",
                why=shown + more,
                fix=_FIX_IMAGES,
            )

    def _where(self) -> str:
        first = str(self._files[0].path)
        return first if len(self._files) == 1 else f"{first} and {len(self._files) - 1} more files"


_FIX_LABELS = "training needs pairs of which one image is preferred (label_0 of 0 or 1)"
_FIX_ROWS = "repair the bad rows, or name other columns; `diffpref check` lists them"
_FIX_IMAGES = "repair or remove those rows (`diffpref check` names them), or raise --data.max_bad_share"


def pair_id(file: int, row: int) -> int:
    """Stable id of row `row` of the `file`-th file (both from 0): 63 bits of blake2b of "<file>:<row>"."""
    return stable_hash(f"{file}:{row}")


def stable_hash(text: str) -> int:
    """63 bits of a text's blake2b, the same on every machine and in every process (unlike `hash`)."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def image_bytes(value: Any) -> bytes | None:
    """Bytes of an image cell: plain bytes, or the {bytes, path} struct of Hugging Face datasets."""
    if isinstance(value, dict):
        value = value["bytes"]
    return value if value is None or isinstance(value, bytes) else bytes(value)
