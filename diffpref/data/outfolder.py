"""A folder of parts that a command writes: claimed by its settings, so that nothing else is mixed in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpref import __version__
from diffpref.data.disk import told_when_not_writable
from diffpref.data.parts import part_path, read_footer
from diffpref.errors import UserError
from diffpref.files import LARGEST_JSON, parse_json, read_text
from diffpref.paths import atomic_write_text, fingerprint, remove_abandoned, sha256_file

SETTINGS, REPORT, MANIFEST = "settings.json", "report.json", "manifest.json"
_EDGE = 2**20  # bytes of each end of a Parquet file that its digest covers; the footer is among them


def claim(out: Path, key: Mapping[str, Any], what: str, name_of: Callable[[str], str]) -> None:
    """Write settings.json into a new folder, or go on in one that has the same.

    what: what the folder holds ("conversion"). name_of(setting): how a setting that differs is called in the
    message ("another --format"), "" for one that may differ. Raises UserError for any other folder and
    for one that cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is no folder", fix="choose another")
    remove_abandoned(out)
    try:
        found = parse_json(read_text(out / SETTINGS, LARGEST_JSON))
    except FileNotFoundError:
        strangers = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
        strangers = [path for path in strangers if not path.startswith(f".{SETTINGS}.")]
        if strangers:
            why = f"it holds {', '.join(strangers[:5])} and no {SETTINGS}"
            raise UserError(f"{out} is not empty and no {what}", why, "choose another --out") from None
        with told_when_not_writable(out):
            atomic_write_text(out / SETTINGS, json.dumps(key, indent=2) + "\n")
        return
    except (ValueError, OSError) as error:
        raise UserError(f"{out / SETTINGS} cannot be read", str(error), "choose another --out") from error
    found = found if isinstance(found, dict) else {}
    names = [name_of(name) for name in {**key, **found} if found.get(name) != key.get(name)]
    differing = list(dict.fromkeys(name for name in names if name))
    if differing:
        raise UserError(
            f"{out} holds a {what} that was made with {' and '.join(differing)}",
            fix="choose another --out, or remove that folder",
        )


def finished_report(out: Path, command: str) -> dict[str, Any] | None:
    """The report of a complete folder; None of one that lacks a part, or a report that can be read.

    Raises UserError when a part is damaged or not of `command`.
    """
    try:
        report: dict[str, Any] = parse_json(read_text(out / REPORT, LARGEST_JSON))
        parts = [part_path(out, number) for number in range(report["parts"])]
    except (ValueError, OSError, KeyError, TypeError):
        return None
    if not all(path.exists() for path in (out / MANIFEST, *parts)):
        return None
    for part in parts:
        read_footer(part, dict, command)
    _refuse_replaced(out, parts)
    return report


def _refuse_replaced(out: Path, parts: Sequence[Path]) -> None:
    """Raise UserError when a part is whole and not the one that was finished here."""
    try:
        recorded = parse_json(read_text(out / MANIFEST, LARGEST_JSON))["parts"]
    except (ValueError, OSError, KeyError, TypeError):
        return  # of a version that recorded none
    found = describe_files({part.name: part for part in parts})
    other = [name for name, about in found.items() if recorded.get(name) != about]
    if other:
        raise UserError(
            f"{out / other[0]} is not the part that was finished here",
            why="its size or its bytes are others than the manifest says",
            fix="remove that file, and the same command makes it again",
        )


def write_manifest(out: Path, key: Mapping[str, Any], packages: tuple[str, ...]) -> None:
    """The last file: the folder is complete. packages: those whose versions shape it."""
    versions = {"diffpref": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    parts = describe_files({path.name: path for path in sorted(out.glob("part-*.parquet"))})
    manifest = {"key": key, "key_hash": fingerprint(key), "versions": versions, "parts": parts}
    atomic_write_text(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def describe_files(files: Mapping[str, Path]) -> dict[str, Any]:
    """[bytes, SHA-256] of each file by its name; of a Parquet file, which may be one of 300 GB, the hash is
    that of its two ends."""
    return {name: [path.stat().st_size, _digest(path)] for name, path in files.items()}


def _digest(path: Path) -> str:
    if path.suffix != ".parquet" or path.stat().st_size <= 2 * _EDGE:
        return sha256_file(path)
    with open(path, "rb") as stream:
        digest = hashlib.sha256(stream.read(_EDGE))
        stream.seek(-_EDGE, 2)
        digest.update(stream.read())
    return digest.hexdigest()
