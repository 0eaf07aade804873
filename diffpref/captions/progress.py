"""Captions of a part that is not finished: kept batch by batch, so that a kill costs the batch under way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa

from diffpref.captions.stages import MADE


def progress_path(part: Path) -> Path:
    return part.with_name(f".{part.stem}.captions.jsonl")


def read_progress(path: Path) -> list[dict[str, Any]]:
    """What was made of the first rows of a part, one MADE row each; an unfinished last batch is left out."""
    try:
        with open(path, "rb") as stream:
            return [row for rows, _ in _batches(stream) for row in rows]
    except FileNotFoundError:
        return []


def _batches(stream: BinaryIO) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """The whole batches, each with the place in the file behind it, up to the first that is torn."""
    place = 0
    for line in stream:
        try:
            rows = [dict(zip(MADE.names, values, strict=True)) for values in json.loads(line)]
        except (ValueError, TypeError):  # a power cut can leave anything in the last blocks
            return
        if not line.endswith(b"\n"):
            return
        place += len(line)
        yield rows, place


class Progress:
    """The file that batches are appended to, a line each. A context manager."""

    def __init__(self, path: Path) -> None:
        self._stream: BinaryIO = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 closed below
        end = max((place for _, place in _batches(self._stream)), default=0)
        self._stream.truncate(end)
        self._stream.seek(end)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()

    def add(self, made: pa.RecordBatch) -> None:
        """Keep a batch: when this returns, it survives the end of the process."""
        rows = [[row[name] for name in MADE.names] for row in made.to_pylist()]
        self._stream.write(json.dumps(rows, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()
