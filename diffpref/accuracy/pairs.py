"""Labelled pairs with their ties, as accuracy is measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np

from diffpref.data.pairs import image_bytes, pair_id
from diffpref.data.reader import RowReader
from diffpref.data.scan import TableStats, scan
from diffpref.data.schema import (
    Captions,
    Columns,
    PickAPicColumns,
    caption_columns,
    check_schema,
    find_files,
    open_file,
)
from diffpref.errors import UserError, nearest
from diffpref.image_tables import ImageRow


def columns_of(names: dict[str, str]) -> PickAPicColumns:
    """The usual columns with the user's names in place. Raises UserError for a key that there is not."""
    known = [item.name for item in fields(PickAPicColumns)]
    for key in names:
        if key not in known:
            close = nearest(key, known)
            fix = f"did you mean {close}?" if close else f"keys: {', '.join(known)}"
            raise UserError(f"--columns has no key {key!r}", fix=fix)
    return PickAPicColumns(**names)


class LabelledPairs:
    """Rows of Parquet pairs that have a label and captions, ties included; texts are held, images streamed.

    labels: float64 [pairs], 1 where image 0 is preferred, 0 where image 1 is, 0.5 for a tie. texts:
    captions of image 0 and image 1, the same when shared. prompts: what pairs are grouped by.
    """

    def __init__(self, spec: str, columns: Columns, captions: Captions) -> None:
        """Raises UserError for everything that `data.pairs.open_pairs` does, and for no pair at all."""
        self.files = [open_file(path) for path in find_files(spec)]
        for file in self.files:
            check_schema(file, columns, captions, option="--columns {}={}")
        found = scan(self.files, columns, captions, ties=True)
        self.stats: TableStats = found.stats
        self.rows, self.labels = found.rows, found.labels
        self._columns, self._reader = columns, RowReader(self.files)
        if not len(self.rows):
            raise UserError(f"no labelled pair in {spec}", why=self.stats.summary())
        names = caption_columns(columns, captions)
        grouped = columns.caption if all(columns.caption in file.schema.names for file in self.files) else ""
        wanted = list(dict.fromkeys([*names, *([grouped] if grouped else [])]))
        texts = RowReader(self.files)
        cells = [texts.read(int(row), wanted) for row in self.rows]
        self.texts: list[tuple[str, str]] = [(cell[names[0]], cell[names[-1]]) for cell in cells]
        self.prompts: list[str] = [str(cell[grouped or names[0]]) for cell in cells]

    def __len__(self) -> int:
        return len(self.rows)

    def source(self, pair: int) -> str:
        return self._reader.describe(int(self.rows[pair]))

    def pair_id(self, pair: int) -> int:
        """The id that seeds the pair's noise, as in training."""
        return pair_id(*self._reader.locate(int(self.rows[pair])))

    def image(self, pair: int, side: int) -> bytes | None:
        """Bytes of image 0 or 1. Cheapest in order of pairs."""
        both = [self._columns.image_0, self._columns.image_1]
        return image_bytes(self._reader.read(int(self.rows[pair]), both)[both[side]])


class PairImages(Sequence[ImageRow]):
    """The images of pairs as rows to score: 2 i and 2 i + 1 are those of pair i."""

    def __init__(self, pairs: LabelledPairs) -> None:
        self._pairs = pairs
        self._prompt_ids = np.unique(pairs.prompts, return_inverse=True)[1]

    def __len__(self) -> int:
        return 2 * len(self._pairs)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        pair, side = divmod(place, 2)
        where = f"{self._pairs.source(pair)} image {side}"
        return ImageRow(
            id=where,
            prompt_id=int(self._prompt_ids[pair]),
            prompt=self._pairs.texts[pair][side],
            kind="all",
            seed=0,
            file="",
            where=where,
            read=partial(self._pairs.image, pair, side),
        )
