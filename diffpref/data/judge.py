"""Candidate pairs judged: a row to keep, or the one reason why not. In this process or in several."""

from __future__ import annotations

import errno
import hashlib
import itertools
import math
import multiprocessing
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from diffpref.data.images import ImageError, decode_image
from diffpref.data.sources.base import (
    BAD_IMAGE,
    BAD_LABEL,
    IDENTICAL,
    MALFORMED,
    MISSING_FILE,
    NO_CAPTION,
    NO_LABEL,
    OUTSIDE,
    TIE,
    Candidate,
    ImageFile,
    RowProblem,
)
from diffpref.engine.local import end_with_parent
from diffpref.files import OutsideError, inside, read_file, reason_of
from diffpref.processes import told_when_a_worker_dies
from diffpref.texts import LONGEST, is_blank, shorten

CHUNK = 16
REMEMBERED = 512

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Judged:
    """row: the output columns but those of the source, or None and why. sizes: (width, height) of both
    images."""

    candidate: Candidate
    row: dict[str, Any] | None
    sizes: tuple[Size, Size] | None = None
    reason: str = ""
    text: str = ""


class Judge:
    """Judges one candidate after the other. An image that was seen a moment ago is not decoded again."""

    def __init__(self, keep_ties: bool) -> None:
        self._keep_ties = keep_ties
        self._seen: OrderedDict[bytes, tuple[str, Size] | str] = OrderedDict()

    def judge(self, candidate: Candidate) -> Judged:
        """What becomes of a row. The first fault counts: of the row, the label, the caption, the images."""
        try:
            if candidate.problem is not None:
                raise RowProblem(*candidate.problem)
            self._check_label(candidate.label)
            row = _texts(candidate)
            blobs = [_image_bytes(image) for image in candidate.images]
            one, two = (self._look(f"image {side}", blob) for side, blob in enumerate(blobs))
            if one == two:
                raise RowProblem(IDENTICAL, "both images are the same")
        except RowProblem as error:
            return Judged(_without_images(candidate), None, None, error.reason, error.text)
        row |= {"jpg_0": blobs[0], "jpg_1": blobs[1], "label_0": candidate.label}
        row |= {"image_0_hash": one[0], "image_1_hash": two[0], **candidate.extra}
        return Judged(_without_images(candidate), row, (one[1], two[1]))

    def _check_label(self, label: float) -> None:
        if math.isnan(label):
            raise RowProblem(NO_LABEL, "there is no label")
        if label not in (0.0, 0.5, 1.0):
            raise RowProblem(BAD_LABEL, f"label is {label:g}, not 0, 0.5 or 1")
        if label == 0.5 and not self._keep_ties:
            raise RowProblem(TIE, "a tie")

    def _look(self, name: str, data: bytes | None) -> tuple[str, Size]:
        """(hash of the decoded pixels as hex digits, (width, height)). Raises RowProblem."""
        key = hashlib.blake2b(data or b"", digest_size=16).digest()
        found = self._seen.get(key)
        if found is None or data is None:
            try:
                image = decode_image(data)
                pixels = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
                pixels.update(image.tobytes())
                found = (pixels.hexdigest(), image.size)
            except ImageError as error:
                found = error.reason
            self._seen[key] = found
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        if isinstance(found, str):
            raise RowProblem(BAD_IMAGE, f"{name}: {found}")
        return found


def _texts(candidate: Candidate) -> dict[str, Any]:
    """The captions, checked. Raises RowProblem: null, empty, no text, or not to be written as UTF-8."""
    texts = {"caption": candidate.caption}
    if candidate.captions is not None:
        texts |= {"caption_0": candidate.captions[0], "caption_1": candidate.captions[1]}
    for name, text in texts.items():
        if text is None or (isinstance(text, str) and is_blank(text[:LONGEST])):
            raise RowProblem(NO_CAPTION, f"{name} is null or empty")
        if not isinstance(text, str):
            raise RowProblem(MALFORMED, f"{name} is {shorten(text)}, not text")
        if len(text) > LONGEST:
            raise RowProblem(MALFORMED, f"{name} has {len(text):,} characters, more than {LONGEST:,}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowProblem(MALFORMED, f"{name} is not valid Unicode") from None
    return texts


def _image_bytes(image: Any) -> bytes | None:
    return _read_file(image) if isinstance(image, ImageFile) else image


def _read_file(image: ImageFile) -> bytes:
    """Bytes of a regular file inside the image's root, links followed. Raises RowProblem."""
    if not image.path:
        raise RowProblem(MISSING_FILE, "the path of an image is empty")
    shown = shorten(image.path)
    try:
        return read_file(inside(image.path, image.root))
    except OutsideError:
        raise RowProblem(OUTSIDE, f"{shown} leads out of the folder of the images") from None
    except OSError as error:
        reason = BAD_IMAGE if error.errno == errno.EFBIG else MISSING_FILE
        raise RowProblem(reason, f"{shown}: {reason_of(error)}") from None


def _without_images(candidate: Candidate) -> Candidate:
    """What the report needs, and no bytes that would travel between processes for nothing."""
    return Candidate(candidate.file, candidate.row, candidate.where)


def judge_all(candidates: Iterable[Candidate], keep_ties: bool, workers: int) -> Iterator[Judged]:
    """Every candidate judged, in order. workers: number of processes; 0 judges in this one."""
    if workers == 0:
        judge = Judge(keep_ties)
        yield from map(judge.judge, candidates)
        return
    context = multiprocessing.get_context("spawn")  # forking beside threads can hang
    rest = iter(candidates)
    chunks = iter(lambda: list(itertools.islice(rest, CHUNK)), [])
    pending: deque[Future[list[Judged]]] = deque()
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(keep_ties,))
    try:
        with told_when_a_worker_dies("--workers"):
            for chunk in chunks:
                pending.append(pool.submit(_judge_chunk, chunk))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_WORKER: Judge | None = None  # set once in each worker process


def _start_worker(keep_ties: bool) -> None:
    global _WORKER
    _WORKER = Judge(keep_ties)
    end_with_parent()  # else a killed command would leave its workers waiting for ever


def _judge_chunk(chunk: list[Candidate]) -> list[Judged]:
    assert _WORKER is not None
    return [_WORKER.judge(candidate) for candidate in chunk]
