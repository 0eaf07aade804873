"""Images and their prompts from wherever they are: a generated folder, any folder, Parquet or CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PROMPT_COLUMNS = ("prompt", "caption", "text")
FILE_COLUMNS = ("file", "file_name", "image", "path")
LISTS = ("manifest.jsonl", "metadata.jsonl", "metadata.csv", "prompts.csv")


@dataclass(frozen=True)
class ImageRow:
    """One image to score. ``read`` gives its bytes; ``where`` names it in messages."""

    id: str
    prompt_id: int
    prompt: str
    kind: str
    seed: int
    file: str
    where: str
    read: Callable[[], bytes]


def read_images(place: Path) -> list[ImageRow]:
    """Rows of a generated folder, a folder of images with a list or with .txt files, a Parquet or a CSV.

    Raises:
        UserError: nothing there, no images, a prompt or a file missing; always with the row's name.
    """
    if place.is_dir():
        rows = _from_folder(place)
    elif place.suffix == ".parquet" and place.is_file():
        rows = _from_parquet(place)
    elif place.suffix in (".csv", ".jsonl") and place.is_file():
        rows = _from_list(place)
    else:
        raise UserError(
            f"no images at {place}",
            why="it is not a folder, .parquet, .csv or .jsonl file"
            if place.exists()
            else "it does not exist",
            fix="give a folder made by diffpref generate, or images with prompts",
        )
    if not rows:
        raise UserError(f"{place} holds no images", fix="draw some first: diffpref generate")
    repeated = _first_repeated(row.id for row in rows)
    if repeated:
        raise UserError(f"{place}: the image {repeated} is listed twice")
    return rows


def score_files(place: Path) -> tuple[Path, Path]:
    """Where the scores of these images are kept: inside a folder, beside a file."""
    if place.is_dir():
        return place / "scores.parquet", place / "scores.json"
    return place.with_name(f"{place.stem}.scores.parquet"), place.with_name(f"{place.stem}.scores.json")


def _from_folder(folder: Path) -> list[ImageRow]:
    for name in LISTS:
        if (folder / name).is_file():
            return _from_list(folder / name)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    entries = []
    for path in files:
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            raise UserError(
                f"{path} has no prompt",
                why=f"neither {beside.name} nor one of {', '.join(LISTS)} says it",
                fix='write metadata.jsonl with lines {"file_name": "a.png", "prompt": "..."}',
            )
        entries.append(
            {"file": str(path.relative_to(folder)), "prompt": beside.read_text(encoding="utf-8").strip()}
        )
    return _rows(entries, folder, folder)


def _from_list(path: Path) -> list[ImageRow]:
    entries: list[dict[str, Any]] = []
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            if path.suffix == ".csv":
                entries = list(csv.DictReader(stream))
            else:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        entry = json.loads(line)
                        if not isinstance(entry, dict):
                            raise ValueError(f"line {number} is not an object")
                        entries.append(entry)
    except (ValueError, OSError, csv.Error) as error:
        raise UserError(f"{path} cannot be read", why=str(error)) from error
    return _rows(entries, path.parent, path)


def _rows(entries: list[dict[str, Any]], root: Path, source: Path) -> list[ImageRow]:
    texts: dict[str, int] = {}
    rows = []
    for number, entry in enumerate(entries):
        file = _first(entry, FILE_COLUMNS, source, number)
        prompt = _first(entry, PROMPT_COLUMNS, source, number)
        rows.append(
            ImageRow(
                id=str(entry.get("id") or file),
                prompt_id=_integer(entry, "prompt_id", texts.setdefault(prompt, len(texts)), source, number),
                prompt=prompt,
                kind=str(entry.get("kind") or "all"),
                seed=_integer(entry, "seed", 0, source, number),
                file=file,
                where=str(root / file),
                read=(root / file).read_bytes,
            )
        )
    return rows


def _from_parquet(path: Path) -> list[ImageRow]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read", why=str(error).splitlines()[0]) from error
    image_column = _column(table, ("image", "jpg", "png", "bytes", *FILE_COLUMNS), "image", path)
    prompt_column = _column(table, PROMPT_COLUMNS, "prompt", path)
    kinds = table["kind"].to_pylist() if "kind" in table.column_names else ["all"] * len(table)
    texts: dict[str, int] = {}
    rows = []
    for number, (prompt, kind) in enumerate(zip(table[prompt_column].to_pylist(), kinds, strict=True)):
        if not prompt:
            raise UserError(f"{path}: row {number} has no prompt", why=f"column {prompt_column!r} is empty")
        rows.append(
            ImageRow(
                id=f"{number:07d}",
                prompt_id=texts.setdefault(prompt, len(texts)),
                prompt=prompt,
                kind=str(kind or "all"),
                seed=0,
                file="",
                where=f"{path}: row {number}",
                read=_cell_reader(table[image_column], number, path),
            )
        )
    return rows


def _cell_reader(column: pa.ChunkedArray, number: int, path: Path) -> Callable[[], bytes]:
    """Bytes of one cell: binary, {"bytes": ..., "path": ...} as in the datasets library, or a file's path."""

    def read() -> bytes:
        value = column[number].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return (path.parent / value).read_bytes()
        return value or b""

    return read


def _column(table: pa.Table, names: tuple[str, ...], what: str, path: Path) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise UserError(
        f"{path} has no {what} column",
        why=f"columns: {', '.join(table.column_names)}",
        fix=f"call it {names[0]!r}",
    )


def _first(entry: dict[str, Any], names: tuple[str, ...], source: Path, number: int) -> str:
    for name in names:
        if isinstance(entry.get(name), str) and entry[name].strip():
            return entry[name]
    raise UserError(f"{source}: row {number} has no {names[0]}", why=f"looked for {', '.join(names)}")


def _integer(entry: dict[str, Any], key: str, default: int, source: Path, number: int) -> int:
    value = entry.get(key)
    if value in (None, ""):
        return default
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{source}: row {number}: {key} must be a whole number, not {value!r}") from None


def _first_repeated(ids: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            return name
        seen.add(name)
    return None
