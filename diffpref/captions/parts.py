"""The parts that `diffpref caption` writes: their bytes depend on the rows alone, not on batches."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffpref.captions.tally import CaptionTally
from diffpref.data.parts import GROUP_BYTES, GROUP_ROWS, TALLY


class CaptionWriter:
    """Writes one part, row group by row group, so that memory does not grow with it. A context manager.

    images: names of the columns whose sizes bound a row group.
    """

    def __init__(self, stream: BinaryIO, schema: pa.Schema, images: Sequence[str]) -> None:
        self._schema, self._images = schema, tuple(images)
        self._tables: list[pa.Table] = []
        self._rows = self._bytes = 0
        bulky = [path for path, name in _leaves(schema) if name in self._images]
        texts = [path for path, _ in _leaves(schema) if path not in bulky]
        # images are compressed already; their smallest and largest bytes would only swell the footer
        self._writer = pq.ParquetWriter(
            stream, schema,
            compression={**dict.fromkeys(texts, "zstd"), **dict.fromkeys(bulky, "none")},
            use_dictionary=[path for path in texts if path.startswith("origin_")],
            write_statistics=texts,
        )  # fmt: skip

    def __enter__(self) -> CaptionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the stream before it is closed, whatever happened; `close` has done so already."""
        with contextlib.suppress(OSError, ValueError):
            self._writer.close()

    def add(self, table: pa.Table) -> None:
        start = 0
        for row, size in enumerate(self._sizes(table)):
            self._rows += 1
            self._bytes += size
            if self._rows >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
                self._tables.append(table.slice(start, row + 1 - start))
                self._flush()
                start = row + 1
        if start < table.num_rows:
            self._tables.append(table.slice(start))

    def close(self, tally: CaptionTally) -> None:
        self._flush()
        self._writer.add_key_value_metadata({TALLY.decode(): json.dumps(tally.to_json())})
        self._writer.close()

    def _flush(self) -> None:
        if self._tables:
            group = pa.concat_tables(self._tables).combine_chunks().cast(self._schema)
            self._writer.write_table(group, row_group_size=GROUP_ROWS)
        self._tables, self._rows, self._bytes = [], 0, 0

    def _sizes(self, table: pa.Table) -> list[int]:
        """Bytes of the images of each row."""
        sizes = [0] * table.num_rows
        for name in self._images:
            column = table.column(name)
            if pa.types.is_struct(column.type):
                column = pc.struct_field(column, "bytes")
            if pa.types.is_binary_view(column.type):  # Arrow measures no views
                column = column.cast(pa.large_binary())
            lengths = pc.fill_null(pc.binary_length(column), 0).to_pylist()
            sizes = [size + length for size, length in zip(sizes, lengths, strict=True)]
        return sizes


def _leaves(schema: pa.Schema) -> list[tuple[str, str]]:
    """(path in Parquet, name of the column) of every leaf of nested columns, as Parquet counts them."""
    sink = io.BytesIO()
    pq.write_table(schema.empty_table(), sink)
    found = pq.read_metadata(sink).schema
    paths = [found.column(i).path for i in range(len(found.names))]
    return [(path, next(name for name in schema.names if _inside(path, name))) for path in paths]


def _inside(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")
