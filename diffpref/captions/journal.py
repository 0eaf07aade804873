"""Answers that were paid for, on disk as they come in: append-only JSON lines, a file for each process."""

from __future__ import annotations

import array
import errno
import hashlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpref.errors import UserError
from diffpref.paths import sync_folder


def request_key(body: dict[str, Any]) -> str:
    """What a request is known by: SHA-256 of its body as JSON with sorted keys."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class Journal:
    """The answers in a folder by request key.

    A line is {"key": ..., "answer": ...} and is handed to the system whole before `add` returns, so it
    survives a kill; `flush` makes it survive a power cut. A line that is torn or damaged is left out. Answers
    stay on disk: memory holds 24 bytes for each, about 150 for those of this process.
    """

    def __init__(self, folder: Path) -> None:
        """Read the folder, which is made where it does not exist. Raises UserError where that fails."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._files = sorted(folder.glob("*.jsonl"))
            found = array.array("q")
            for number, file in enumerate(self._files):
                for short, place in _lines(file):
                    found.extend((short, number, place))
        except OSError as error:
            raise UserError(
                f"the journal {folder} cannot be used",
                why=f"{type(error).__name__}: {error.strerror}",
                fix="give a folder that can be written",
            ) from error
        table = np.frombuffer(found, np.int64).reshape(-1, 3)
        self._old: NDArray[np.int64] = table[np.argsort(table[:, 0], kind="stable")]
        self._new: dict[int, int] = {}
        self._lock = threading.Lock()
        self._own = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._descriptor = -1
        self._end = 0

    def count(self) -> int:
        """How many answers there are."""
        return len(self._old) + len(self._new)

    def get(self, key: str) -> str | None:
        """The answer to the request `key`, None where there is none."""
        short = _short(key)
        start, end = np.searchsorted(self._old[:, 0], [short, short + 1])
        for _, number, place in self._old[start:end].tolist():
            answer = _answer_at(self._files[number], place, key)
            if answer is not None:
                return answer
        place = self._new.get(short)
        return None if place is None else _answer_at(self._own, place, key)

    def add(self, key: str, answer: str) -> None:
        """Keep an answer. Raises UserError where it cannot be written (a full disk, say)."""
        line = json.dumps({"key": key, "answer": answer}).encode() + b"\n"
        with self._lock:
            try:
                self._append(line)
            except OSError as error:
                raise UserError(
                    f"the journal {self._own} cannot be written", why=str(error.strerror), fix="make room"
                ) from error
            self._new[_short(key)] = self._end
            self._end += len(line)

    def _append(self, line: bytes) -> None:
        if self._descriptor < 0:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND
            self._descriptor = os.open(self._own, flags, 0o666)
            sync_folder(self.folder)
        if os.write(self._descriptor, line) < len(line):
            os.ftruncate(self._descriptor, self._end)  # or the next line would continue this one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        """Make all answers survive a power cut."""
        if self._descriptor >= 0:
            os.fsync(self._descriptor)


def _short(key: str) -> int:
    """63 bits of a key; lines of equal ones are told apart by the whole."""
    return int(key[:16], 16) >> 1


def _lines(file: Path) -> Iterator[tuple[int, int]]:
    """Short key and offset of each whole line."""
    place = 0
    with file.open("rb") as stream:
        for line in stream:
            record = _parse(line)
            if record is not None:
                yield _short(record[0]), place
            place += len(line)


def _answer_at(file: Path, place: int, key: str) -> str | None:
    with file.open("rb") as stream:
        stream.seek(place)
        record = _parse(stream.readline())
    return record[1] if record is not None and record[0] == key else None


def _parse(line: bytes) -> tuple[str, str] | None:
    """Key and answer of a line, None where it is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
        key, answer = record["key"], record["answer"]
        int(key[:16], 16)
    except (ValueError, TypeError, KeyError):
        return None
    return (key, answer) if len(key) == 64 and isinstance(answer, str) else None
