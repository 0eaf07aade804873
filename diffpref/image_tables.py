"""Images and their prompts from wherever they are: a generated folder, any folder, Parquet, CSV or JSON
lines.

`open_images(place)` gives a sequence of rows. Prompts are read at once, images when a row's `read` is
called; a Parquet file is then streamed, so memory does not grow with its images.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffpref.data.reader import RowReader
from diffpref.data.schema import PairFile, check_groups, first_line, group_faults
from diffpref.errors import UserError, nearest
from diffpref.files import read_file
from diffpref.image_folders import entry_of, list_folder, warn_of, within
from diffpref.list_files import read_entries
from diffpref.texts import LONGEST

_OURS = ("scores.parquet", "scores.json")
LISTS = ("manifest.jsonl", "metadata.jsonl", "metadata.csv", "prompts.csv")
COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("image", "jpg", "png", "bytes", "file", "file_name", "path"),
    "prompt": ("prompt", "caption", "text"),
    "id": ("id",),
    "prompt_id": ("prompt_id",),
    "kind": ("kind",),
    "seed": ("seed",),
}
"""Keys of --columns, and the names that are looked for without it, in order."""
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
_BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)
_TYPES: dict[str, tuple[Callable[[pa.DataType], bool], ...]] = {
    "image": (*_BYTES, *_TEXT, pa.types.is_struct),
    "prompt": _TEXT,
}
_FILES_FIRST = ("file", "file_name", "image", "path")  # in lists, which name images by their path


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
    read: Callable[[], bytes | None]


def open_images(
    place: Path, columns: Mapping[str, str] | None = None, prompts: bool = True
) -> Sequence[ImageRow]:
    """Rows of a generated folder, a folder of images with a list or .txt files, Parquet, a CSV or JSON lines.

    columns: names of columns by key of COLUMNS. prompts: whether each image must have one; an empty text
    counts as one. Without prompts each image is a prompt of its own, "".

    Raises:
        UserError: nothing there, no images, no such column, a prompt or a file's name missing; always with
            the row's name.
    """
    columns = dict(columns or {})
    for key in columns:
        if key not in COLUMNS:
            close = nearest(key, COLUMNS)
            fix = f"did you mean {close}?" if close else f"keys: {', '.join(COLUMNS)}"
            raise UserError(f"--columns has no key {key!r}", fix=fix)
    suffix = place.suffix.lower()
    if os.path.isdir(place):
        rows = _from_folder(place, columns, prompts)
    elif suffix == ".parquet" and os.path.isfile(place):
        rows = ParquetImages([place], columns, prompts)
    elif suffix in (".csv", ".tsv", ".jsonl") and os.path.isfile(place):
        rows = _from_list(place, columns, prompts)
    else:
        raise UserError(
            f"no images at {place}",
            why="it is not a folder, .parquet, .csv, .tsv or .jsonl file"
            if os.path.exists(place)
            else "it does not exist",
            fix="give a folder made by diffpref generate, or images with prompts",
        )
    if not len(rows):
        raise UserError(f"{place} holds no images", fix="draw some first: diffpref generate")
    repeated = _first_repeated(rows.ids() if isinstance(rows, ParquetImages) else (row.id for row in rows))
    if repeated:
        raise UserError(f"{place}: the image {repeated} is listed twice")
    return rows


def score_files(place: Path) -> tuple[Path, Path]:
    """Where the scores of these images are kept: inside a folder, beside a file."""
    if place.is_dir():
        return place / "scores.parquet", place / "scores.json"
    return place.with_name(f"{place.name}.scores.parquet"), place.with_name(f"{place.name}.scores.json")


def _from_folder(folder: Path, columns: Mapping[str, str], prompts: bool) -> Sequence[ImageRow]:
    found = list_folder(folder)
    for name in LISTS:
        if (folder / name).is_file():
            rows = _from_list(within(folder, name), columns, prompts)
            listed = {os.path.normpath(row.file) for row in rows}
            unlisted = [path for path in found.images if path not in listed]
            warn_of(unlisted, folder, f"not in {name} and not scored")
            return rows
    tables = [path for path in found.left_out if path.lower().endswith(".parquet")]
    tables = [path for path in tables if "/" not in path and not path.startswith(".")]
    tables = [path for path in tables if not path.endswith("scores.parquet")]
    used = [] if found.images else tables
    others = [path for path in (*found.linked, *found.left_out) if path not in (*used, *_OURS)]
    names = {os.path.splitext(path)[0] for path in found.images}
    others += [path for name, texts in found.texts.items() for path in texts if name not in names]
    warn_of(others, folder, "not scored")
    if not found.images:
        return ParquetImages([folder / path for path in tables], columns, prompts) if tables else []
    if columns:
        raise UserError(f"--columns has no effect: {folder} holds images without a list")
    entries = [
        entry_of(path, found.texts.get(os.path.splitext(path)[0], []), folder) for path in found.images
    ]
    bare = [str(entry["file"]) for entry in entries if "prompt" not in entry]
    if bare and (prompts or len(bare) < len(entries)):
        raise UserError(
            f"{folder / bare[0]} has no prompt" + (f", nor have {len(bare) - 1} others" if bare[1:] else ""),
            why=f"neither {Path(bare[0]).with_suffix('.txt').name} nor one of {', '.join(LISTS)} says it",
            fix='write metadata.jsonl with lines {"file_name": "a.png", "prompt": "..."}',
        )
    return _rows(entries, {}, folder, folder, prompts)


def _from_list(path: Path, columns: Mapping[str, str], prompts: bool) -> list[ImageRow]:
    return _rows(read_entries(path), columns, path.parent, path, prompts)


def _rows(
    entries: list[dict[str, Any]], columns: Mapping[str, str], root: Path, source: Path, prompts: bool
) -> list[ImageRow]:
    texts: dict[str, int] = {}
    rows = []
    file_names = [columns["image"]] if "image" in columns else list(_FILES_FIRST)
    prompt_names = [columns["prompt"]] if "prompt" in columns else list(COLUMNS["prompt"])
    present = list(dict.fromkeys(name for entry in entries for name in entry))
    for name in columns.values():
        if entries and name not in present:
            close = nearest(name, present)
            raise UserError(
                f"{source} has no column {name!r}",
                why=f"columns: {', '.join(map(str, present))}",
                fix=f"did you mean {close!r}?" if close else "",
            )
    _check_numbered([_value(entry, columns, "prompt_id") in (None, "") for entry in entries], source)
    for number, entry in enumerate(entries):
        file = _text(entry, file_names)
        if not file:
            raise UserError(
                f"{source}: row {number} names no image", why=f"looked for {', '.join(file_names)}"
            )
        prompt = _text(entry, prompt_names)
        if prompt is None and prompts:
            raise UserError(
                f"{source}: row {number} has no {prompt_names[0]}",
                why=f"looked for {', '.join(prompt_names)}",
            )
        if prompt and len(prompt) > LONGEST:
            raise UserError(f"{source}: row {number}: the prompt has {len(prompt):,} characters")
        shown = file.encode("utf-8", "backslashreplace").decode()
        own = texts.setdefault(f"\0{number}" if prompt is None else prompt, len(texts))
        value = partial(_value, entry, columns)
        rows.append(
            ImageRow(
                id=str(value("id") or shown),
                prompt_id=_integer(value("prompt_id"), "prompt_id", own, source, number),
                prompt=prompt or "",
                kind=str(value("kind") or "all"),
                seed=_integer(value("seed"), "seed", 0, source, number),
                file=shown,
                where=str(root / shown),
                read=partial(_read_named, root / file),
            )
        )
    return rows


def _read_named(path: Path) -> bytes:
    """Raises OSError, also for a name that tables, which are UTF-8, cannot keep."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise OSError(errno.EINVAL, "its name is not UTF-8") from None
    return read_file(path)


class ParquetImages(Sequence[ImageRow]):
    """Rows of Parquet files in order: images as bytes, as the {bytes, path} of the datasets library, or
    paths.

    Texts and numbers are held as Arrow columns; images are streamed when they are read, cheapest in order.
    Not safe for concurrent threads.
    """

    def __init__(self, files: Sequence[Path], columns: Mapping[str, str], prompts: bool) -> None:
        self._files = [_open(path) for path in files]
        self._reader = RowReader(self._files)
        schema = self._files[0].schema
        for file in self._files[1:]:
            if file.schema.names != schema.names:
                raise UserError(f"{file.path} and {files[0]} have different columns")
        self._image = _column("image", columns, schema, files[0])
        found = {key: _column(key, columns, schema, files[0], key == "prompt" and prompts) for key in COLUMNS}
        wanted = {key: name for key, name in found.items() if name and key != "image"}
        for file in self._files:
            _check_type("image", file, self._image)
            _check_type("prompt", file, found["prompt"])
        self._texts = {key: _read_column(self._files, name, key) for key, name in wanted.items()}
        self._check_prompts(found["prompt"], prompts)
        self._prompt_ids = self._own_prompt_ids()

    def __len__(self) -> int:
        return sum(file.rows for file in self._files)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return ImageRow(
            id=self._cell("id", place, f"{place:07d}"),
            prompt_id=int(self._prompt_ids[place]),
            prompt=self._cell("prompt", place, ""),
            kind=self._cell("kind", place, "all"),
            seed=_integer(self._raw("seed", place), "seed", 0, self._files[0].path, place),
            file="",
            where=self._reader.describe(place),
            read=partial(self._bytes, place),
        )

    def ids(self) -> Iterable[str]:
        return (
            (self._cell("id", row, f"{row:07d}") for row in range(len(self))) if "id" in self._texts else ()
        )

    def _raw(self, key: str, row: int) -> Any:
        return self._texts[key][row].as_py() if key in self._texts else None

    def _cell(self, key: str, row: int, default: str) -> str:
        value = self._raw(key, row)
        return default if value is None or (value == "" and key != "prompt") else str(value)

    def _bytes(self, row: int) -> bytes | None:
        value = self._reader.read(row, [self._image])[self._image]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return read_file(self._files[self._reader.locate(row)[0]].path.parent / value)
        return value

    def _check_prompts(self, name: str, prompts: bool) -> None:
        if "prompt" not in self._texts:
            return
        empty = np.flatnonzero(pc.is_null(self._texts["prompt"]).to_numpy(zero_copy_only=False))
        if len(empty) and prompts:
            where = self._reader.describe(int(empty[0]))
            raise UserError(f"{where} has no prompt", why=f"column {name!r} is null in {len(empty)} rows")

    def _own_prompt_ids(self) -> Any:
        if "prompt_id" in self._texts:
            _check_numbered(self._texts["prompt_id"].is_null().to_pylist(), self._files[0].path)
            return [
                _integer(value.as_py(), "prompt_id", row, self._files[0].path, row)
                for row, value in enumerate(self._texts["prompt_id"])
            ]
        if "prompt" not in self._texts:
            return np.arange(len(self))
        # in order of first appearance, as in lists
        return pc.dictionary_encode(self._texts["prompt"].fill_null("")).indices.to_numpy()


def _open(path: Path) -> PairFile:
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read", why=first_line(error)) from error
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    file = PairFile(path, metadata.schema.to_arrow_schema(), groups, group_faults(metadata))
    check_groups(file)
    return file


def _check_type(key: str, file: PairFile, name: str) -> None:
    kind = file.schema.field(name).type if name else pa.null()
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_kind(kind) for is_kind in _TYPES[key]):
        raise UserError(
            f"{file.path}: the column {name!r} holds {kind}, which is no {key}",
            fix=f"name another column with --columns {key}=NAME",
        )


def _read_column(files: Sequence[PairFile], name: str, key: str) -> pa.Array:
    parts = []
    for file in files:
        try:
            column = pq.read_table(file.path, columns=[name])[name]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file.path} cannot be read", why=first_line(error)) from error
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        parts.append(pa.table({name: column.cast(pa.large_string()) if key == "prompt" else column}))
    try:
        return pa.concat_tables(parts, promote_options="permissive")[name].combine_chunks()
    except pa.ArrowException as error:
        raise UserError(f"the files' columns {name!r} do not fit together", why=first_line(error)) from error


def _column(
    key: str, columns: Mapping[str, str], schema: pa.Schema, path: Path, required: bool = False
) -> str:
    """The column's name; "" where it is left out and not required. The image's is."""
    names = [columns[key]] if key in columns else list(COLUMNS[key])
    for name in names:
        if name in schema.names:
            return name
    if key not in columns and not required and key != "image":
        return ""
    close = nearest(names[0], schema.names)
    raise UserError(
        f"{path} has no {key} column",
        why=f"looked for {', '.join(names)}; columns: {', '.join(schema.names)}",
        fix=f"name it with --columns {key}={close or 'NAME'}",
    )


def _value(entry: Mapping[str, Any], columns: Mapping[str, str], key: str) -> Any:
    return entry.get(columns.get(key, key))


def _text(entry: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((entry[name] for name in names if isinstance(entry.get(name), str)), None)


def _integer(value: Any, key: str, default: int, source: Path, number: int) -> int:
    if value in (None, ""):
        return default
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or (isinstance(value, float) and whole != value) or not -(2**63) <= whole < 2**63:
        raise UserError(f"{source}: row {number}: {key} must be a whole number, not {value!r}")
    return whole


def _check_numbered(without: Sequence[bool], source: Path) -> None:
    """Numbers of our own beside given ones could make one prompt of two."""
    if any(without) and not all(without):
        raise UserError(f"{source}: row {without.index(True)} has no prompt_id", why="other rows have one")


def _first_repeated(ids: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            return name
        seen.add(name)
    return None
