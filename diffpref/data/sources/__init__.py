"""Where preference pairs come from. SOURCES lists the formats; each has a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffpref.data.sources.base import Request, Source
from diffpref.data.sources.entries import first_cells
from diffpref.data.sources.folders import open_folders, pair_folders
from diffpref.data.sources.hpdv2 import PAIR_KEYS, RANK_KEYS, open_hpdv2
from diffpref.data.sources.hpdv3 import KEYS, open_hpdv3
from diffpref.data.sources.lists import CSV_SUFFIXES, open_csv, open_jsonl
from diffpref.data.sources.parquet import has_own_captions, open_pick_a_pic, open_pick_double_caption
from diffpref.errors import UserError

SOURCES: dict[str, Callable[[Request], Source]] = {
    "pick-a-pic": open_pick_a_pic,
    "pick-double-caption": open_pick_double_caption,
    "hpdv2": open_hpdv2,
    "hpdv3": open_hpdv3,
    "jsonl": open_jsonl,
    "csv": open_csv,
    "folders": open_folders,
}
_PARQUET = ("pick-a-pic", "pick-double-caption")
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


def open_source(name: str, request: Request) -> tuple[str, Source]:
    """The format ("auto": told from the place) and the opened source.

    Raises UserError when the place does not fit the format, or no format fits.
    """
    name = _detect(request) if name == "auto" else name
    _check_kind(name, request.place)
    return name, SOURCES[name](request)


def _detect(request: Request) -> str:
    place = request.place
    if (
        isinstance(place, Path)
        and place.is_dir()
        and pair_folders(place)
        and not any(place.glob("*.parquet"))
    ):
        return "folders"
    if isinstance(place, str) or place.is_dir() or place.suffix == ".parquet":
        return "pick-double-caption" if has_own_captions(request) else "pick-a-pic"
    if place.suffix.lower() in CSV_SUFFIXES:
        return "csv"
    if place.suffix.lower() not in _JSON_SUFFIXES:
        raise UserError(
            f"{place} is in no known format",
            why=f"its name ends in {place.suffix or 'nothing'}",
            fix=f"say what it is with --format {'|'.join(SOURCES)}",
        )
    return "jsonl" if request.columns else _detect_json(place)


def _detect_json(path: Path) -> str:
    names = {name for cells in first_cells(path) for name in cells}
    if set(PAIR_KEYS) <= names or set(RANK_KEYS) <= names:
        return "hpdv2"
    return "hpdv3" if set(KEYS) <= names else "jsonl"


def _check_kind(name: str, place: Path | str) -> None:
    """Raise UserError when `place` cannot hold the format: a folder for a list, JSON that has other keys."""
    if name in _PARQUET:
        return
    wants_folder = name == "folders"
    if isinstance(place, str) or place.is_dir() != wants_folder:
        raise UserError(
            f"--format {name} reads {'a folder' if wants_folder else 'one file'}, and {place} is none",
            fix="give the folder that holds w and l" if wants_folder else "name the file, such as train.json",
        )
    needed = {"hpdv2": (PAIR_KEYS, RANK_KEYS), "hpdv3": (KEYS,)}.get(name, ())
    names = {key for cells in first_cells(place) for key in cells} if needed else set()
    if needed and not any(set(keys) <= names for keys in needed):
        raise UserError(
            f"{place} is not in the format {name}",
            why=f"it needs {' or '.join(', '.join(keys) for keys in needed)}; the first rows have "
            f"{', '.join(sorted(names)) or 'no keys'}",
            fix="choose another --format, or leave it out to have it told from the file",
        )
