"""Folders `w` (preferred) and `l` with images of the same names, captions in a file or files beside."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffpref.data.sources.base import (
    MALFORMED,
    MISSING_FILE,
    OUTSIDE,
    Candidate,
    ImageFile,
    Request,
    RowProblem,
    Source,
    Wanted,
    refuse_columns,
)
from diffpref.data.sources.entries import Entry, read_entries
from diffpref.data.sources.lists import CSV_SUFFIXES, read_csv
from diffpref.errors import UserError
from diffpref.files import LARGEST_LIST, OutsideError, inside, read_text, reason_of
from diffpref.image_folders import CAPTION_SUFFIXES, IMAGE_SUFFIXES, list_folder, warn_of, within
from diffpref.paths import fingerprint

SIDES = ("w", "l")
CAPTION_FILES = tuple(f"captions{suffix}" for suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt"))
NAME_KEYS = ("name", "file", "file_name", "image")
TEXT_KEYS = ("caption", "prompt", "text")


@dataclass
class _Found:
    """Paths under one name. own: caption files of each side; shared: of both."""

    images: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    own: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    shared: list[str] = field(default_factory=list)


@dataclass
class _Captions:
    """Captions by name. unusable: where and why, of rows without a name; twice: names with two captions."""

    texts: dict[str, Any] = field(default_factory=dict)
    unusable: list[tuple[str, str]] = field(default_factory=list)
    twice: set[str] = field(default_factory=set)


def open_folders(request: Request) -> Source:
    """Pairs by name, sorted: `w/a.png` and `l/a.jpg` are one. Names and captions are held in memory.

    `w` and `l` stand in the folder or one level deeper (`NAME/w`, `NAME/l`), any number of times. Captions:
    one of CAPTION_FILES or NAME.txt (.caption) in the folder are the pair's, NAME.txt in `w` or `l` is that
    image's own. Where one differs, the source is dual. Every name is a row, whether it comes from `w`, from
    `l` or from the captions.
    """
    refuse_columns(request, "folders")
    if request.images is not None:
        raise UserError("--images has no effect with --format folders", fix="leave --images out")
    place = Path(request.place)
    found, links = _look_through(place)
    files = {name: place / name for name in CAPTION_FILES if os.path.lexists(place / name)}
    if len(files) > 1:
        raise UserError(f"{place} holds both {' and '.join(files)}", fix="leave one file of captions")
    captions = _read_captions(place, *files.values()) if files else _Captions()
    for name in captions.texts:
        found.setdefault(name, _Found())
    dual = any(_has_own(place, item, captions.texts.get(name)) for name, item in found.items())

    def read(_: Wanted) -> Iterator[Candidate | int]:
        for row, name in enumerate(sorted(found)):
            yield _candidate(place, row, name, found[name], captions, dual)
        for row, link in enumerate(links, len(found)):
            yield Candidate(link, row, "", problem=(OUTSIDE, "a link to a folder is not followed"))
        for row, (where, text) in enumerate(captions.unusable, len(found) + len(links)):
            yield Candidate(next(iter(files)), row, where, problem=(MALFORMED, text))

    return Source(
        files=files, read=read, dual=dual, key={"names": fingerprint([dual, _listing(found, links)])}
    )


def pair_folders(place: Path) -> list[str]:
    """Where `w` or `l` stands: "" for the folder itself, and names of folders in it."""
    inner = [entry.name for entry in os.scandir(place) if entry.is_dir(follow_symlinks=False)]
    names = ["", *sorted(name for name in inner if name not in SIDES and not name.startswith("."))]
    return [name for name in names if any((place / name / side).is_dir() for side in SIDES)]


def _look_through(place: Path) -> tuple[dict[str, _Found], list[str]]:
    """Files by their path without ending, and links to folders. What is neither image nor caption is warned
    of."""
    found: dict[str, _Found] = {}
    links: list[str] = []
    left_out: list[str] = []
    for base in pair_folders(place) or [""]:
        prefix = f"{base}/" if base else ""
        for number, side in enumerate(SIDES):
            if not (place / base / side).is_dir():
                raise UserError(
                    f"{place / base / side} is no folder",
                    why="the preferred images stand in a folder w and the others in a folder l beside it",
                    fix="give the folder that holds both",
                )
            head = f"{prefix}{side}/"
            listing = list_folder(place / base / side)
            for path in listing.images:
                found.setdefault(prefix + os.path.splitext(path)[0], _Found()).images[number].append(
                    head + path
                )
            for name, texts in listing.texts.items():
                found.setdefault(prefix + name, _Found()).own[number].extend(head + text for text in texts)
            links += [head + path for path in listing.linked]
            left_out += [head + path for path in listing.left_out]
    warn_of(left_out, place, "neither an image nor a caption, and left out")
    for name, item in found.items():
        paths = (name + suffix for suffix in CAPTION_SUFFIXES)
        item.shared.extend(path for path in paths if os.path.lexists(place / path))
    return found, links


def _has_own(place: Path, item: _Found, listed: Any) -> bool:
    """Whether an image of a pair has another caption than the pair."""
    if not any(item.own):
        return False
    try:
        caption, *own = _texts(place, item, listed)
    except RowProblem:
        return False
    return any(text != caption for text in own)


def _texts(place: Path, item: _Found, listed: Any) -> list[Any]:
    """Captions of the pair, of `w` and of `l`: where one has none, the first there is of the others."""
    own = [_read_one(place, texts) for texts in item.own]
    shared = _read_one(place, item.shared) if listed is None else listed
    caption = next((text for text in (shared, *own) if text is not None), None)
    return [caption, *(caption if text is None else text for text in own)]


def _listing(found: Mapping[str, _Found], links: list[str]) -> list[Any]:
    """What decides which rows there are, and which captions they have."""
    names = [
        [os.fsencode(name).hex(), *map(len, item.images), *map(len, item.own), len(item.shared)]
        for name, item in sorted(found.items())
    ]
    return [names, [os.fsencode(link).hex() for link in links]]


def _candidate(place: Path, row: int, name: str, found: _Found, captions: _Captions, dual: bool) -> Candidate:
    file = next((files[0] for files in found.images if files), name)
    try:
        for side, files in zip(SIDES, found.images, strict=True):
            if not files:
                raise RowProblem(MISSING_FILE, f"there is no image of that name in {side}")
            if len(files) > 1:
                raise RowProblem(MALFORMED, f"there are {' and '.join(files)}")
        if name in captions.twice:
            raise RowProblem(MALFORMED, "it has two different captions")
        caption, *own = _texts(place, found, captions.texts.get(name))
    except RowProblem as error:
        return Candidate(file, row, "", problem=(error.reason, error.text))
    images = tuple(ImageFile(files[0], str(place)) for files in found.images)
    return Candidate(file, row, "", caption, (images[0], images[1]), 1.0, (own[0], own[1]) if dual else None)


def _read_one(place: Path, paths: list[str]) -> str | None:
    """The caption in these files, which must agree; None without one. Bytes that are no UTF-8 become lone
    surrogates, which makes the row bad. Raises RowProblem."""
    texts = {_read_text(place, path) for path in paths}
    if len(texts) > 1:
        raise RowProblem(MALFORMED, f"{' and '.join(paths)} differ")
    return texts.pop() if texts else None


def _read_text(place: Path, path: str) -> str:
    try:
        return read_text(inside(path, place), errors="surrogateescape").strip()
    except OutsideError:
        raise RowProblem(OUTSIDE, f"the caption {path} leads out of the folder") from None
    except OSError as error:
        raise RowProblem(MISSING_FILE, f"the caption {path}: {reason_of(error)}") from None


def _read_captions(place: Path, path: Path) -> _Captions:
    captions = _Captions()
    for entry in _entries(within(place, path.name)):
        name = next((entry.cells[key] for key in NAME_KEYS if entry.cells.get(key)), None)
        if entry.problem or not isinstance(name, str):
            keys = ", ".join(NAME_KEYS)
            captions.unusable.append((entry.where, entry.problem or f"the row names no image ({keys})"))
            continue
        stem, suffix = os.path.splitext(name)
        name = stem if suffix.lower() in IMAGE_SUFFIXES else name
        text = next((entry.cells[key] for key in TEXT_KEYS if key in entry.cells), None)
        if captions.texts.setdefault(name, text) != text:
            captions.twice.add(name)
    return captions


def _entries(path: Path) -> Iterator[Entry]:
    if path.suffix in CSV_SUFFIXES:
        return read_csv(path)
    return _text_lines(path) if path.suffix == ".txt" else read_entries(path)


def _text_lines(path: Path) -> Iterator[Entry]:
    """Lines of NAME, a tab, the caption."""
    try:
        lines = read_text(path, LARGEST_LIST, "surrogateescape").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read", why=reason_of(error)) from error
    for number, line in enumerate(lines, 1):
        name, tab, caption = line.partition("\t")
        if line.strip():
            problem = "" if tab else "the line has no tab behind a name"
            yield Entry(number - 1, f"line {number}", {"name": name, "caption": caption}, problem)
