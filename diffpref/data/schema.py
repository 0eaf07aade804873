"""Where the pairs are, which columns they have, and what their labels and captions say.

The canonical schema is Pick-a-Pic's (Parquet): `caption`, `jpg_0`, `jpg_1` (image bytes), `label_0` (1:
image 0 won, 0: image 1 won, 0.5: tie), optionally `has_label`, `caption_0`, `caption_1`. Column names are
configurable.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.errors import UserError
from diffpref.files import LARGEST_IMAGE
from diffpref.image_folders import warn_of
from diffpref.paths import resolve

Captions = Literal["shared", "dual"]
MOST_EXPANSION = 30
"""Times that a column may grow when it is unpacked; images are compressed already."""
HAS_LABEL = "has_label"
OTHER_LABEL = "label_1"
_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}


class Columns(Protocol):
    """Names of the columns of a pairs file (config.ColumnsConfig, or anything with these attributes)."""

    @property
    def caption(self) -> str: ...
    @property
    def image_0(self) -> str: ...
    @property
    def image_1(self) -> str: ...
    @property
    def label_0(self) -> str: ...
    @property
    def caption_0(self) -> str: ...
    @property
    def caption_1(self) -> str: ...


@dataclass(frozen=True)
class PickAPicColumns:
    """The default column names."""

    caption: str = "caption"
    image_0: str = "jpg_0"
    image_1: str = "jpg_1"
    label_0: str = "label_0"
    caption_0: str = "caption_0"
    caption_1: str = "caption_1"


@dataclass(frozen=True)
class PairFile:
    """One Parquet file of pairs: its path, its Arrow schema and the number of rows of its row groups.

    faults: what is wrong with row groups that must not be read, by their number.
    """

    path: Path
    schema: pa.Schema
    group_rows: tuple[int, ...]
    faults: Mapping[int, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(self.group_rows)


def find_files(spec: str | Path) -> list[Path]:
    """Parquet files named by a file, a folder (its *.parquet) or a glob, sorted by name.

    Raises UserError when nothing is there, and when a folder mixes splits (train and validation): training on
    held-out pairs by accident must not be the default.
    """
    resolved = Path(resolve(str(spec)))
    if os.path.isfile(resolved):
        return [resolved]
    if os.path.isdir(resolved):
        files = _files_of(resolved)
        if not files:
            inside = ", ".join(sorted(p.name for p in resolved.iterdir())[:8]) or "nothing"
            raise UserError(
                f"no Parquet file in the folder {resolved}",
                why=f"it holds: {inside}",
                fix="give a file, a folder with *.parquet files, or a glob such as 'pairs/train-*.parquet'",
            )
        splits = sorted({s for p in files if (s := _split_of(p))})
        if len(splits) > 1:
            raise UserError(
                f"the folder {resolved} mixes splits: {', '.join(splits)}",
                why="training on held-out pairs would make every validation figure meaningless",
                fix=f"name one split, for example '{glob.escape(str(resolved))}/{splits[0]}*.parquet'",
            )
        return files
    matches = sorted(Path(p) for p in glob.glob(str(spec), recursive=True) if not os.path.isdir(p))
    _check_files(matches)
    if not matches:
        raise UserError(
            f"no pairs at {spec}",
            why="there is no such file or folder, and as a glob it matches no file",
            fix="check the name; a relative path starts at the current folder",
        )
    return matches


def _files_of(folder: Path) -> list[Path]:
    """Parquet files of a folder; a warning names those of folders in it, which are not used."""
    below = [p for p in folder.rglob("*") if p.suffix.lower() == ".parquet" and not p.is_dir()]
    below = [p for p in below if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    files = sorted(p for p in below if p.parent == folder)
    _check_files(files)
    deeper = [str(p.relative_to(folder)) for p in sorted(below) if p.parent != folder]
    warn_of(deeper if files else [], folder, "in a folder of it and not used")
    return files


def _check_files(files: Iterable[Path]) -> None:
    """Raise UserError for a broken link, a pipe or a device, which would be left out unseen."""
    for path in files:
        if not path.is_file():
            why = "it is a broken link" if path.is_symlink() else "it is no file"
            raise UserError(f"{path} cannot be read", why=why, fix="remove it, or name the others")


def open_file(path: Path) -> PairFile:
    """Read the footer of a Parquet file. Raises UserError when it is not Parquet or cannot be read."""
    try:
        metadata = pq.read_metadata(path)
        groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        return PairFile(path, metadata.schema.to_arrow_schema(), groups, group_faults(metadata))
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        raise UserError(
            f"{path} cannot be read as Parquet",
            why=first_line(error),
            fix="pairs are Parquet files with Pick-a-Pic's columns; fetch an incomplete download again",
        ) from error


def group_faults(metadata: pq.FileMetaData) -> dict[int, str]:
    """Row groups of which a column expands as no images or captions do, by their number: a cell of 500 MB can
    be 24 KB on disk, and Arrow holds all of it several times before anybody sees how long it is."""
    found = {}
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(group.num_columns if group.total_byte_size > LARGEST_IMAGE else 0):
            column = group.column(place)
            size, stored = column.total_uncompressed_size, column.total_compressed_size
            if size > LARGEST_IMAGE and size > MOST_EXPANSION * stored:
                name = column.path_in_schema.partition(".")[0]
                found[number] = f"'{name}' expands from {stored:,} bytes to {size:,}, as no images do"
    return found


def check_groups(file: PairFile) -> None:
    """Raise UserError for a file with a row group that must not be read."""
    for number, fault in file.faults.items():
        raise UserError(
            f"{file.path} holds cells too large to read",
            why=f"in row group {number} {fault}",
            fix="leave those rows out: diffpref convert does, and names them",
        )


def caption_columns(columns: Columns, captions: Captions) -> tuple[str, ...]:
    """Names of the caption columns a run reads: one when shared, two (image 0, image 1) when dual."""
    if captions not in ("shared", "dual"):
        raise UserError(f"captions must be 'shared' or 'dual', got {captions!r}", fix="set --data.captions")
    return (columns.caption,) if captions == "shared" else (columns.caption_0, columns.caption_1)


def check_schema(
    file: PairFile, columns: Columns, captions: Captions, option: str = "--data.columns.{} {}"
) -> None:
    """Raise UserError unless `file` has every column the run reads, each of a usable type.

    option: how the command at hand names another column: the key of Columns, then the name.
    """
    names = file.schema.names
    missing = [name for name in caption_columns(columns, captions) if name not in names]
    if captions == "dual" and missing:
        raise UserError(
            f"{file.path} has no column {_quoted(missing)}, which dual captions need",
            why=f"each image has a caption of its own there; columns present: {', '.join(names)}",
            fix="make them with `diffpref caption --pairs P --method captioning|perturbation|hybrid`, "
            f"name existing ones with {option.format('caption_0', 'NAME')} and "
            f"{option.format('caption_1', 'NAME')}, or use shared captions",
        )
    fields = {"image_0": _is_image, "image_1": _is_image, "label_0": _is_label}
    texts = ("caption",) if captions == "shared" else ("caption_0", "caption_1")
    fields |= dict.fromkeys(texts, is_text)
    wanted = {_is_image: "image bytes (binary)", _is_label: "a number: 0, 0.5 or 1", is_text: "text"}
    for key, accepts in fields.items():
        name = getattr(columns, key)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            raise UserError(
                f"{file.path} has no column '{name}'",
                why=f"columns present: {', '.join(names)}",
                fix=f"name the right column with {option.format(key, near[0] if near else 'NAME')}",
            )
        kind = _type_of(file, name)
        if not accepts(kind):
            raise UserError(
                f"column '{name}' of {file.path} holds {kind}, not {wanted[accepts]}",
                fix=f"convert the column, or name another with {option.format(key, 'NAME')}",
            )
    for name in (HAS_LABEL, OTHER_LABEL):
        kind = _type_of(file, name) if name in names else pa.null()
        if not (_is_label(kind) or pa.types.is_null(kind)):
            meaning = "true or false" if name == HAS_LABEL else "a number: 1 - label_0"
            raise UserError(
                f"column '{name}' of {file.path} holds {kind}, not {meaning}",
                fix="convert the column, or leave it out",
            )


def _type_of(file: PairFile, name: str) -> pa.DataType:
    if file.schema.names.count(name) > 1:
        raise UserError(f"{file.path} has the column '{name}' twice", fix="rename or leave out one of them")
    return file.schema.field(name).type


def needed_columns(file: PairFile, columns: Columns, captions: Captions) -> Sequence[str]:
    """The columns of the label-and-caption scan: never the images."""
    wanted = [columns.label_0, *caption_columns(columns, captions)]
    wanted += [name for name in (HAS_LABEL, OTHER_LABEL) if name in file.schema.names and name not in wanted]
    return list(dict.fromkeys(wanted))


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # Hugging Face datasets store {bytes, path}
        return "bytes" in kind.names and _is_image(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_label(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _split_of(path: Path) -> str | None:
    word = path.stem.lower().replace("_", "-").split("-")[0].split(".")[0]
    return _SPLITS.get(word)


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)
