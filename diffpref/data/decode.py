"""Pairs in order, decoded at training size, in this process or in several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from diffpref.data.buckets import Buckets
from diffpref.data.images import PixelSample, to_pixels
from diffpref.data.pairs import PairTable
from diffpref.engine.local import end_with_parent
from diffpref.processes import told_when_a_worker_dies

CHUNK = 16


@dataclass(frozen=True)
class DecodedPair:
    """Pair `index` of the table: winner and loser at training size, or None and why it cannot be used."""

    index: int
    id: int
    source: str
    images: tuple[PixelSample, PixelSample] | None
    reason: str = ""


class PairDecoder:
    """Decodes ranges of a table. A context manager: it may hold worker processes.

    workers: number of processes; 0 decodes in this one.
    """

    def __init__(self, table: PairTable, buckets: Buckets, workers: int = 0) -> None:
        self._table, self._buckets = table, buckets
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            context = multiprocessing.get_context("spawn")  # forking beside torch's threads can hang
            self._pool = ProcessPoolExecutor(
                workers, context, initializer=_start_worker, initargs=(table, buckets)
            )

    def __enter__(self) -> PairDecoder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def decode(self, start: int, stop: int) -> Iterator[DecodedPair]:
        """Pairs start..stop-1 in order. Raises UserError when too many rows are bad."""
        if self._pool is None:
            for index in range(start, stop):
                yield _decode(self._table, index, self._buckets)
            return
        chunks = [range(first, min(first + CHUNK, stop)) for first in range(start, stop, CHUNK)]
        with told_when_a_worker_dies("data.workers"):
            for decoded in self._pool.map(_decode_chunk, chunks):
                yield from decoded


def _decode(table: PairTable, index: int, buckets: Buckets) -> DecodedPair:
    pair = table.try_load(index)
    if pair is not None:
        size = buckets.choose(*(image.size[::-1] for image in (pair.winner_image, pair.loser_image)))
        images = (to_pixels(pair.winner_image, size), to_pixels(pair.loser_image, size))
        return DecodedPair(index, pair.id, pair.source, images)
    return DecodedPair(index, table.pair_id(index), table.source(index), None, table.problem(index))


_WORKER: tuple[PairTable, Buckets] | None = None  # set once in each worker process


def _start_worker(table: PairTable, buckets: Buckets) -> None:
    global _WORKER
    _WORKER = (table, buckets)
    end_with_parent()


def _decode_chunk(indices: range) -> list[DecodedPair]:
    assert _WORKER is not None
    table, buckets = _WORKER
    return [_decode(table, index, buckets) for index in indices]
