"""The job of `diffpref caption` for the engines: part n made by one worker."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffpref.captions.backends import on_device, reach_before_paying
from diffpref.captions.base import Captioner, Perturber
from diffpref.captions.encoders import TextTokenizer, load_tokenizer
from diffpref.captions.parts import CaptionWriter
from diffpref.captions.progress import Progress, progress_path, read_progress
from diffpref.captions.source import PairSource, Slice, SliceReader
from diffpref.captions.stages import MADE, Method, Row, add_columns, added_columns, decode, losers, make
from diffpref.captions.tally import CaptionTally
from diffpref.data.parts import await_writer, part_path, staged
from diffpref.data.schema import Columns
from diffpref.engine import Worker, ahead
from diffpref.errors import UserError
from diffpref.paths import fingerprint

DECODERS = 4
"""Threads that decode the images of a batch."""


@dataclass(frozen=True)
class CaptionJob:
    """What makes every part; see CaptionOptions. most_failed: rows that may be left out in all."""

    source: PairSource
    out: Path
    columns: Columns
    method: Method
    captioner: Captioner | None
    perturber: Perturber | None
    tokenizer: str
    replace: bool
    batch: int
    rows_per_file: int
    most_failed: int

    @property
    def count(self) -> int:
        """Number of parts."""
        return -(-self.source.rows // self.rows_per_file)

    def parts(self) -> list[Path]:
        return [part_path(self.out, number) for number in range(self.count)]

    def rows(self, number: int) -> range:
        """The source rows of a part."""
        start = number * self.rows_per_file
        return range(start, min(start + self.rows_per_file, self.source.rows))

    def schema(self) -> pa.Schema:
        """Columns of a part: those of the source, and then ours."""
        added = added_columns(self.columns)
        fields = [item for item in self.source.schema if item.name not in added]
        return pa.schema([*fields, *(pa.field(name, kind) for name, kind in added.items())])

    @cached_property
    def counter(self) -> TextTokenizer | None:
        return load_tokenizer(self.tokenizer) if self.tokenizer else None

    @property
    def token_limit(self) -> int:
        """Tokens that the text encoder reads; 0 where none are counted."""
        return self.counter.limit if self.counter else 0

    def tokenizer_hash(self) -> str:
        """Of everything that decides how many tokens a text has; "" without a tokenizer."""
        if self.counter is None:
            return ""
        backend = getattr(self.counter.tokenizer, "backend_tokenizer", None)
        return fingerprint(backend.to_str() if backend else self.counter.tokenizer.get_vocab())

    def __getstate__(self) -> dict[str, Any]:
        """The loaded tokenizer stays here; each worker loads its own."""
        return {name: value for name, value in self.__dict__.items() if name != "counter"}

    def start(self, device: str) -> Worker:
        return _Maker(self, device).make


class _Maker:
    """A worker: the backends on its device, and a reader that goes through the source once."""

    def __init__(self, job: CaptionJob, device: str) -> None:
        self._job = job
        self._captioner = on_device(job.captioner, device)
        self._perturber = on_device(job.perturber, device)
        reach_before_paying(self._captioner, self._perturber)
        self._makers = (
            job.captioner.provenance() if job.captioner is not None else None,
            job.perturber.provenance() if job.perturber is not None else None,
        )
        self._reader = SliceReader(job.source, job.batch)
        self._failed = 0

    def make(self, number: int) -> Iterator[int]:
        """Make a part; yields the rows of each batch that was captioned for it."""
        job, part = self._job, part_path(self._job.out, number)
        await_writer(part)
        if part.exists():
            return
        tally, columns = CaptionTally(), job.columns
        images = (columns.image_0, columns.image_1)
        with (
            staged(part) as stream,
            Progress(progress_path(part)) as progress,
            CaptionWriter(stream, job.schema(), images) as writer,
        ):
            for piece, made, is_new in self._pieces(job.rows(number), progress_path(part)):
                if is_new:
                    progress.add(made)
                count = job.counter.count if job.counter else None
                table = add_columns(piece, made, columns, self._makers, count)
                writer.add(table)
                tally.add(piece, made, table, losers(piece, columns))
                if is_new:
                    yield made.num_rows
            writer.close(tally)
        progress_path(part).unlink(missing_ok=True)
        self._failed += tally.dropped.total()
        if self._failed > job.most_failed and job.count > 1:  # else the report is as quick
            self._give_up(tally)

    def _pieces(self, rows: range, kept_in: Path) -> Iterator[tuple[Slice, pa.RecordBatch, bool]]:
        """Every slice of a part with what was made of it, and whether that was now or by an earlier run."""
        kept = read_progress(kept_in)[: len(rows)]
        middle = rows.start + len(kept)
        for piece in self._reader.read(rows.start, middle):
            start = piece.row - rows.start
            made = kept[start : start + piece.batch.num_rows]
            yield piece, pa.RecordBatch.from_pylist(made, schema=MADE), False
        job = self._job
        with closing(ahead(self._decoded(middle, rows.stop))) as stream:
            for piece, ready in stream:
                yield piece, make(ready, job.method, self._captioner, self._perturber), True

    def _decoded(self, start: int, stop: int) -> Iterator[tuple[Slice, Sequence[Row]]]:
        job, with_images = self._job, self._captioner is not None
        with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as threads:
            for piece in self._reader.read(start, stop):
                yield piece, decode(piece, job.columns, with_images, threads)

    def _give_up(self, tally: CaptionTally) -> None:
        row, _, detail = tally.bad[-1] if tally.bad else ("", "", "")
        raise UserError(
            f"{self._failed:,} rows got no captions, more than allowed of {self._job.source.rows:,} "
            "(--max-failed-share)",
            why=f"{row}: {detail}",
            fix="see what is wrong with them; a larger --max-failed-share goes on from here",
        )
