"""The files that a conversion writes: Parquet parts, whole or absent, each with its own tally inside."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.data.disk import told_when_not_writable
from diffpref.data.judge import Judged
from diffpref.data.sources.base import Source
from diffpref.errors import UserError
from diffpref.files import parse_json
from diffpref.paths import sync_folder

GROUP_ROWS = 256
GROUP_BYTES = 32 * 2**20
NAMED_BAD_ROWS = 100
PATIENCE = 60.0  # seconds to wait for another writer of a file
TALLY = b"diffpref"
T = TypeVar("T")


@dataclass
class Tally:
    """Counts of a part, or of all: read = kept + dropped.

    labels: kept rows by label ("1": image 0 is preferred). sizes: images of kept rows by "WIDTHxHEIGHT".
    bad: (row, reason, what is wrong) of the first bad rows; ties are counted and not named.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    bad: list[list[str]] = field(default_factory=list)

    def add(self, judged: Judged) -> None:
        self.read += 1
        if judged.row is None or judged.sizes is None:
            self.dropped[judged.reason] += 1
            if judged.reason != "tie" and len(self.bad) < NAMED_BAD_ROWS:
                source = f"{judged.candidate.file} {judged.candidate.where}".strip()
                self.bad.append([_printable(text) for text in (source, judged.reason, judged.text)])
            return
        self.kept += 1
        self.labels[f"{judged.row['label_0']:g}"] += 1
        self.sizes.update(f"{width}x{height}" for width, height in judged.sizes)

    def merge(self, other: Tally) -> None:
        """Add the counts of the part that follows."""
        self.read += other.read
        self.kept += other.kept
        for mine, theirs in ((self.dropped, other.dropped), (self.labels, other.labels)):
            mine.update(theirs)
        self.sizes.update(other.sizes)
        self.bad += other.bad[: NAMED_BAD_ROWS - len(self.bad)]

    def to_json(self) -> dict[str, Any]:
        return {
            "read": self.read, "kept": self.kept, "dropped": dict(sorted(self.dropped.items())),
            "labels": dict(sorted(self.labels.items())), "sizes": dict(sorted(self.sizes.items())),
            "bad": self.bad,
        }  # fmt: skip

    @staticmethod
    def from_json(found: dict[str, Any]) -> Tally:
        dropped, labels, sizes = (Counter(found[name]) for name in ("dropped", "labels", "sizes"))
        return Tally(found["read"], found["kept"], dropped, labels, sizes, found["bad"])


def part_schema(source: Source) -> pa.Schema:
    """The canonical columns, captions of a dual source, what the source keeps, where rows come from."""
    own = [("caption_0", pa.string()), ("caption_1", pa.string())] if source.dual else []
    return pa.schema(
        [
            ("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()),
            ("label_0", pa.float32()), *own, *source.extra.items(), ("source_file", pa.string()),
            ("source_row", pa.int64()), ("image_0_hash", pa.string()), ("image_1_hash", pa.string()),
        ]
    )  # fmt: skip


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def read_tally(path: Path) -> Tally:
    """The tally of a finished part. Raises UserError when the file is not one of ours or damaged."""
    return read_footer(path, Tally.from_json, "convert")


def read_footer(path: Path, parse: Callable[[dict[str, Any]], T], command: str) -> T:
    """What `command` left in the footer of a part that it finished, parsed.

    Raises UserError when the file is not one of its own or damaged.
    """
    try:
        return parse(parse_json(pq.read_metadata(path).metadata[TALLY]))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a part that diffpref {command} finished",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="remove that file, and the same command makes it again",
        ) from error


class PartWriter:
    """Writes one part, row group by row group, so that memory does not grow with the part."""

    def __init__(self, stream: BinaryIO, schema: pa.Schema) -> None:
        texts = [item.name for item in schema if not pa.types.is_binary(item.type)]
        self._schema, self.tally = schema, Tally()
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        # images are compressed already; their smallest and largest bytes would only swell the footer
        compression = {item.name: "zstd" if item.name in texts else "none" for item in schema}
        self._writer = pq.ParquetWriter(
            stream, schema, compression=compression, use_dictionary=False, write_statistics=texts
        )

    def add(self, judged: Judged) -> None:
        self.tally.add(judged)
        if judged.row is None:
            return
        source = {"source_file": _printable(judged.candidate.file), "source_row": judged.candidate.row}
        self._rows.append({**judged.row, **source})
        self._bytes += len(judged.row["jpg_0"]) + len(judged.row["jpg_1"])
        if len(self._rows) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finish the part; after an error let go of the stream, else Arrow writes to it once it is closed."""
        if error is None:
            self.close()
            return
        with contextlib.suppress(Exception):
            self._writer.close()

    def close(self) -> None:
        self._flush()
        self._writer.add_key_value_metadata({TALLY.decode(): json.dumps(self.tally.to_json())})
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._bytes = [], 0


@contextlib.contextmanager
def staged(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, flushed and renamed to it when all went well, removed when not.

    Raises UserError when another process is writing it, and when nobody may.
    """
    temporary = _staging(path)
    with contextlib.ExitStack() as held:
        with told_when_not_writable(temporary):
            stream = held.enter_context(open(temporary, "ab", opener=_no_link))
        _lock(stream, temporary)
        try:
            stream.truncate(0)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def _no_link(path: str, flags: int) -> int:
    """Open a file, and no link, whose target would be emptied."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def await_writer(path: Path) -> None:
    """Wait while another process writes `path`, up to PATIENCE seconds: workers on a cluster can outlive a
    command that was killed, and what they finish need not be made again."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            with open(_staging(path), "r+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return  # nothing is staged, or a file system without locks


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _lock(stream: BinaryIO, path: Path) -> None:
    taken = UserError(f"another process is writing {path}", fix="wait for it, or write to another folder")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise taken from None
    except OSError:
        return  # a file system without locks
    # between open and lock the other process may have finished and renamed the file
    if not path.exists() or os.fstat(stream.fileno()).st_ino != path.stat().st_ino:
        raise taken


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
