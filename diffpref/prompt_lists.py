"""Prompts of published benchmarks, and of plain lists, from files that the user has or from the hub.

No texts come with the package: each loader reads the file as its authors publish it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.data.schema import first_line
from diffpref.errors import UserError, nearest
from diffpref.files import LARGEST_JSON, parse_json, read_text, reason_of
from diffpref.image_folders import within
from diffpref.list_files import read_entries
from diffpref.paths import resolve_or_hub_id
from diffpref.texts import LONGEST, is_blank, shorten


@dataclass(frozen=True)
class ListFormat:
    """How a benchmark is published.

    prompt, kind: names of its columns ("" for none). marks: columns by which a table is known. files:
    patterns of its files in a hub dataset.
    """

    prompt: str
    kind: str
    marks: tuple[str, ...]
    files: tuple[str, ...]


FORMATS: dict[str, ListFormat] = {
    "parti": ListFormat("Prompt", "Category", ("Prompt", "Category", "Challenge"), ("*.tsv",)),
    "drawbench": ListFormat("Prompts", "Category", ("Prompts", "Category"), ("*.csv",)),
    "geneval": ListFormat("prompt", "tag", ("tag", "include", "prompt"), ("*evaluation_metadata.jsonl",)),
    "hpdv2": ListFormat("", "", (), ("*anime.json", "*concept-art.json", "*paintings.json", "*photo.json")),
    "pick-a-pic": ListFormat("caption", "", ("caption", "jpg_0", "jpg_1"), ("*test_unique*.parquet",)),
    "prompts": ListFormat("", "", (), ("*.txt", "*.csv", "*.tsv", "*.jsonl", "*.json")),
}
"""Names that --suite NAME:PATH takes. "prompts" is any list: its columns are looked for."""
PROMPT_COLUMNS = ("prompt", "caption", "text", "Prompt", "Prompts")
KIND_COLUMNS = ("kind", "category", "Category", "tag")
HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet")


def read_prompts(
    source: str, form: str = "auto", prompt_column: str = "", kind_column: str = ""
) -> list[tuple[str, str]]:
    """(text, kind) of each prompt in the order of the file.

    source: a file, a folder (of HPDv2's four lists, or of Parquet), or a hub id where `form` is named. form:
    a key of FORMATS, or "auto" to tell it by content. prompt_column, kind_column: other columns than usual.

    Raises UserError: nothing there, no prompts, a row without one, no such column or format.
    """
    if form != "auto" and form not in FORMATS:
        close = nearest(form, FORMATS)
        fix = f"did you mean {close!r}?" if close else f"known: auto, {', '.join(FORMATS)}"
        raise UserError(f"there is no format of prompts {form!r}", fix=fix)
    place = _find(source, form)
    if place.is_dir() and (form == "hpdv2" or (form == "auto" and _styles(place))):
        if prompt_column or kind_column:
            raise UserError(f"{place} holds lists of texts, which have no columns")
        found = _hpdv2(place)
    else:
        found = [
            prompt for path in _files(place, form) for prompt in _read(path, form, prompt_column, kind_column)
        ]
    if not found:
        raise UserError(f"{place} holds no prompts")
    return found


def _find(source: str, form: str) -> Path:
    if form == "auto":
        place = Path(source).expanduser()
        if not os.path.exists(place):
            raise UserError(
                f"no prompts at {source}",
                why="it does not exist here",
                fix=f"for a dataset of the hub name its format, such as parti:{source}",
            )
        return place
    found = resolve_or_hub_id(source, "prompts")
    return found if isinstance(found, Path) else _fetch(found, FORMATS[form].files)


def _fetch(repository: str, patterns: Sequence[str]) -> Path:
    """The folder of a hub dataset's files, from its cache or the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"no prompts at {repository}, neither here nor on the hub",
            why=first_line(error),
            fix="check the path or the hub id, the network, and that you are logged in where that is needed",
        ) from error


def _styles(folder: Path) -> list[Path]:
    files = {path.stem: path for path in sorted(folder.rglob("*.json")) if path.stem in HPDV2_STYLES}
    return [files[style] for style in HPDV2_STYLES if style in files]


def _hpdv2(folder: Path) -> list[tuple[str, str]]:
    """A JSON list of texts for each style, which is the kind."""
    files = _styles(folder)
    missing = sorted(set(HPDV2_STYLES) - {path.stem for path in files})
    if missing:
        raise UserError(
            f"{folder} is not the whole HPDv2 benchmark", why=f"missing: {', '.join(missing)} (.json)"
        )
    return [(text, path.stem) for path in files for text in _texts(_json(path), path)]


def _files(place: Path, form: str) -> list[Path]:
    """The file itself; of a folder the files of the format, or the Parquet files."""
    if place.is_file():
        return [place]
    patterns = ("*.parquet",) if form == "auto" else FORMATS[form].files
    for pattern in (*patterns, "*.parquet"):
        found = (path for path in place.rglob("*") if fnmatch(path.name.lower(), pattern))
        files = sorted(path for path in found if not path.is_dir())  # a broken link is an error
        if files:
            return [within(place, path.relative_to(place)) for path in files]
    raise UserError(
        f"no prompts in {place}",
        why=f"looked for {', '.join(patterns)}",
        fix="give the file itself, or name the format, such as --suite parti:PATH",
    )


def _read(path: Path, form: str, prompt_column: str, kind_column: str) -> list[tuple[str, str]]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path} is not a list of prompts", why=f"known endings: {', '.join(SUFFIXES)}")
    if suffix == ".txt":
        if prompt_column or kind_column:
            raise UserError(f"{path} is plain text, which has no columns")
        return [(line.strip(), "all") for line in _text(path).splitlines() if not is_blank(line)]
    content = _json(path) if suffix == ".json" else None
    if isinstance(content, list) and all(isinstance(item, str) for item in content):
        return [(text, "all") for text in _texts(content, path)]
    columns, rows = _table(path, content)
    prompt, kind = _choose(path, columns, form, prompt_column, kind_column)
    if suffix == ".parquet":
        rows = _parquet(path, [name for name in (prompt, kind) if name])
    found = []
    for number, row in enumerate(rows):
        text = row.get(prompt)
        if not isinstance(text, str) or is_blank(text) or len(text) > LONGEST:
            raise UserError(f"{path}: row {number} has no prompt", why=f"its {prompt!r} is {shorten(text)}")
        found.append((text.strip(), str(row.get(kind) or "all").strip() or "all" if kind else "all"))
    return found


def _choose(
    path: Path, columns: Sequence[str], form: str, prompt_column: str, kind_column: str
) -> tuple[str, str]:
    """Names of the columns of texts and of kinds, "" for none."""
    known = FORMATS.get(form) or next(
        (f for f in FORMATS.values() if f.marks and set(f.marks) <= set(columns)), FORMATS["prompts"]
    )
    prompts = [prompt_column] if prompt_column else [known.prompt] if known.prompt else PROMPT_COLUMNS
    kinds = [kind_column] if kind_column else [known.kind] if known.prompt else KIND_COLUMNS
    prompt = next((name for name in prompts if name in columns), "")
    kind = next((name for name in kinds if name in columns), "")
    for wanted, name in ((prompts, prompt), (kinds if kind_column else (), kind)):
        if wanted and not name:
            close = nearest(wanted[0], columns)
            raise UserError(
                f"{path} has no column {' or '.join(wanted)}",
                why=f"columns: {', '.join(map(str, columns))}",
                fix=f"did you mean {close!r}?" if close else "",
            )
    return prompt, kind


def _table(path: Path, content: Any) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Column names, and the rows of all but Parquet."""
    if path.suffix.lower() == ".parquet":
        try:
            return pq.read_schema(path).names, []
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read", why=first_line(error)) from error
    if path.suffix.lower() == ".json":
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise UserError(f"{path} is not a list of prompts", why="it holds neither texts nor objects")
        rows: list[Mapping[str, Any]] = list(content)
    else:
        rows = list(read_entries(path))
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _parquet(path: Path, columns: list[str]) -> list[Mapping[str, Any]]:
    try:
        return list(pq.read_table(path, columns=columns).to_pylist())  # images are not read
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read", why=first_line(error)) from error


def _json(path: Path) -> Any:
    try:
        found = parse_json(_text(path))
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair can be read, but not written
    except ValueError as error:
        raise UserError(f"{path} is not JSON of whole characters", why=str(error)) from error
    return found


def _text(path: Path) -> str:
    try:
        return read_text(path, LARGEST_JSON)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read", why=reason_of(error)) from error


def _texts(content: Any, path: Path) -> list[str]:
    if not isinstance(content, list):
        raise UserError(f"{path} is not a list of texts")
    for number, text in enumerate(content):
        if not isinstance(text, str) or is_blank(text) or len(text) > LONGEST:
            raise UserError(f"{path}: entry {number} is not a text", why=f"it is {shorten(text)}")
    return [text.strip() for text in content]
