"""What every kind of source gives: candidate pairs in a fixed order, judged later."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffpref.errors import UserError, nearest
from diffpref.texts import shorten

TIE, NO_LABEL, BAD_LABEL, NO_CAPTION = "tie", "no_label", "bad_label", "no_caption"
MISSING_FILE, OUTSIDE, BAD_IMAGE = "missing_file", "outside_images", "bad_image"
IDENTICAL, MALFORMED = "identical_images", "malformed_row"
REASONS = {
    TIE: "ties",
    NO_LABEL: "without a label",
    BAD_LABEL: "with a label that is not 0, 0.5 or 1",
    NO_CAPTION: "without a caption",
    MISSING_FILE: "with an image file that is missing",
    OUTSIDE: "with a path that leads out of the image folder",
    BAD_IMAGE: "with an image that cannot be decoded",
    IDENTICAL: "of identical images",
    MALFORMED: "malformed",
}
"""Why a row is dropped, and how reports call it. The first that holds, in the order of `judge`, counts."""
HARMLESS = frozenset({TIE, NO_LABEL, IDENTICAL})
"""Reasons that are no fault of the data, and do not count towards --max-bad-share."""

Wanted = Callable[[int, int], bool]
"""wanted(first, stop): whether any candidate from number `first` to `stop` - 1 is still to be converted."""


class RowProblem(Exception):
    """A row cannot be used: one of REASONS, and one clause that says what is wrong."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(reason, text)
        self.reason, self.text = reason, text


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image named by a path, which must lie inside the folder `root` once links are followed."""

    path: str
    root: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One pair as the source has it; nothing is checked but what `problem` says.

    file: its name in reports. where: the row in it, for messages ("row 3 (line 4)"); row: its number, from 0.
    images: bytes as found, or the file that holds them. label: 1 for image 0, NaN for none.
    captions: each image's own caption, in sources that have them.
    """

    file: str
    row: int
    where: str
    caption: Any = None
    images: tuple[Any, Any] = (None, None)
    label: float = math.nan
    captions: tuple[Any, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class Request:
    """What the user asks to convert: a place, and the folder of the images and column names, if given."""

    place: Path | str
    images: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """An opened source.

    files: what is fingerprinted, by the name that reports use. key: what else decides which rows there are.
    extra: columns kept beside the canonical ones. rows: their number, where it is known without reading.
    read(wanted): every candidate in order; an int n stands for n that were not wanted and not read.
    """

    files: Mapping[str, Path]
    read: Callable[[Wanted], Iterator[Candidate | int]]
    dual: bool = False
    extra: Mapping[str, pa.DataType] = field(default_factory=dict)
    key: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None


def read_label(value: Any) -> float:
    """A label cell as a number, NaN when it is empty. Raises RowProblem when it is neither."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan", "none", "null")):
        return math.nan
    try:
        if isinstance(value, (bool, int, float, str)):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise RowProblem(BAD_LABEL, f"label is {shorten(value)}")


def check_opposite(label: float, other: float) -> None:
    """Raise RowProblem when both labels are there and do not add up to 1: then nobody knows who won."""
    if not math.isnan(label) and not math.isnan(other) and label + other != 1.0:
        raise RowProblem(BAD_LABEL, f"labels {label:g} and {other:g} contradict each other")


def image_file(value: Any, root: Path) -> ImageFile:
    """The image that a path cell names; an empty cell names none, which reading it finds out."""
    if value is not None and not isinstance(value, str):
        raise RowProblem(MALFORMED, f"image path is {shorten(value)}, not text")
    return ImageFile(value or "", str(root))


def image_root(request: Request, source: Path) -> Path:
    """The folder that paths start at and may not leave: --images, else the folder of the source file."""
    return request.images if request.images is not None else source.parent


def refuse_columns(request: Request, name: str) -> None:
    """Raise UserError when columns were renamed for a format whose names are fixed."""
    if request.columns:
        raise UserError(
            f"--columns has no effect with --format {name}",
            why="the names of that format are fixed",
            fix="leave --columns out, or use --format jsonl, csv or pick-a-pic",
        )


def name_columns(request: Request, defaults: Mapping[str, str]) -> dict[str, str]:
    """The defaults with the user's names in place. Raises UserError for a key that there is not."""
    for key in request.columns:
        if key not in defaults:
            close = nearest(key, defaults)
            raise UserError(
                f"--columns has no key {key!r}",
                fix=f"did you mean {close}?" if close else f"keys: {', '.join(defaults)}",
            )
    return {**defaults, **request.columns}


def relative_names(files: list[Path]) -> dict[str, Path]:
    """Files by names that stay the same when all of them move: paths below their common folder."""
    common = os.path.commonpath([path.parent for path in files])
    return {os.path.relpath(path, common): path for path in files}
