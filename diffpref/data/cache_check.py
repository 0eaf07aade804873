"""`diffpref check CACHE`: every file of a cache read and compared with what its manifest says.

Nothing is loaded but one file at a time, so memory does not grow with the cache.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor
from tqdm import tqdm

from diffpref.data.cache_need import in_units
from diffpref.data.cache_parts import FORMAT
from diffpref.data.cached import INDEX, MANIFEST
from diffpref.data.check import find_parts
from diffpref.data.encoding import ABOUT, STORED
from diffpref.errors import UserError
from diffpref.paths import fingerprint

PLACES = {"pair_id": (), "index": (), "row": (), "size": (2,), "original": (2, 2), "crop": (2, 2, 2)}
"""Shapes of what latents' files say of each pair."""
_LATENT = re.compile(r"(mean|logvar)/(\d+)x(\d+)")
_SHARD = re.compile(r"\d{5,}\.safetensors")


class _Fault(Exception):
    """What is wrong with a file, in one clause."""


@dataclass
class PartReport:
    """What one part of a cache holds. problems: (file, what is wrong with it).

    rows: of the table that it was made from: pairs and those left out, or those that have captions; None
    where that is not known.
    """

    folder: Path
    files: int = 0
    size: int = 0
    holds: str = ""
    rows: int | None = None
    problems: list[tuple[Path, str]] = field(default_factory=list)

    def add(self, name: str, problem: str) -> None:
        self.problems.append((self.folder / name, problem))


def check_cache(folder: Path, out: TextIO | None = None) -> list[PartReport]:
    """Read every file of a cache and print what was found (to `out`, by default standard output).

    Raises UserError, after all is read, when a file is missing, damaged or not of this cache, when latents or
    embeddings are not finite, or when a part is unfinished.
    """
    parts = list(find_parts(folder))
    if not parts:
        raise UserError(f"{folder} holds no cache", fix="name a folder that diffpref encode or train made")
    total = sum(path.stat().st_size for part in parts for path in part.glob("*.safetensors"))
    with tqdm(total=total, desc="check", unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:
        reports = [_check_part(part, bar) for part in parts]
    _compare_rows(reports)
    width = max(len(str(report.folder)) for report in reports)
    for report in reports:
        state = _count(report.problems) if report.problems else "good"
        line = f"{report.folder!s:<{width}}  {report.files:,} files  {in_units(report.size)}  {report.holds}"
        print(f"{line}  {state}", file=out or sys.stdout)
    problems = [problem for report in reports for problem in report.problems]
    for path, text in problems:
        print(f"  {path}: {text}", file=out or sys.stdout)
    if problems:
        raise UserError(
            f"{_count(problems)} in the cache {folder}",
            why=f"{problems[0][0]}: {problems[0][1]}",
            fix="remove the files named above and run diffpref encode with the config of the cache: it makes "
            "these anew and no others",
        )
    return reports


def _check_part(folder: Path, bar: tqdm[Any]) -> PartReport:
    report = PartReport(folder)
    manifest = _manifest(report)
    found = {path.name for path in folder.glob("*.safetensors")}
    if manifest is None:
        report.files = len(found)
        return report
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name in sorted(found - set(files)):
        report.add(name, "the manifest does not name it")
    kind = _LatentCheck(manifest) if folder.name == "latents" else _TextCheck(manifest)
    for name, about in files.items():
        report.files += 1
        report.size += about["size"]
        try:
            kind.check(name, _read(folder / name, about, manifest["key_hash"]))
        except FileNotFoundError:
            report.add(name, "it is missing")
        except _Fault as fault:
            report.add(name, str(fault))
        bar.update(about["size"])
    if not report.problems:  # else the counts are those of the files that are whole
        for text in kind.compare():
            report.add(MANIFEST, text)
        report.rows = kind.rows()
    report.holds = kind.holds()
    return report


def _manifest(report: PartReport) -> dict[str, Any] | None:
    """The manifest, None with a problem where it is of no use."""
    path = report.folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["key"]["format"] != FORMAT:
            report.add(MANIFEST, "it is of another version of diffpref")
        elif fingerprint(manifest["key"]) != manifest["key_hash"]:
            report.add(MANIFEST, "its key and the hash of it differ")
        elif not all(isinstance(about["sha256"], str) for about in manifest["files"].values()):
            report.add(MANIFEST, "it names files without their SHA-256")
        else:
            return manifest
    except FileNotFoundError:
        report.add(MANIFEST, "there is none: the cache is unfinished, and diffpref encode continues it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        report.add(MANIFEST, f"it cannot be read ({type(error).__name__}: {error})")
    return None


def _read(path: Path, about: Mapping[str, Any], key_hash: str) -> dict[str, Tensor]:
    """The tensors of a file whose bytes are those that were written. Raises _Fault, FileNotFoundError."""
    try:
        data = path.read_bytes()
        if len(data) != about["size"]:
            raise _Fault(f"it has {len(data):,} bytes instead of {about['size']:,}")
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            raise _Fault("its bytes are not those that were written: the SHA-256 differs")
        with safe_open(path, "pt") as opened:
            key = json.loads(opened.metadata()[ABOUT])["key"]
        tensors: dict[str, Tensor] = load(data)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _Fault(f"it cannot be read ({type(error).__name__}: {error})") from error
    if key != key_hash:
        raise _Fault("it belongs to another cache")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise _Fault(f"{name} is not finite")
    return tensors


class _LatentCheck:
    """Files of latents: shapes, rows and ids, one after the other."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        self._manifest, self._key = manifest, manifest["key"]
        self._ids: list[np.ndarray[Any, Any]] = []
        self._last = -1
        self._latent: tuple[float, float, float] | None = None  # channels, pixels a row and a column

    def check(self, name: str, tensors: dict[str, Tensor]) -> None:
        number = int(Path(name).stem) if _SHARD.fullmatch(name) else -1
        shards = self._manifest["shards"]
        if not 0 <= number < len(shards):
            raise _Fault("the manifest counts no pairs of it")
        pairs = shards[number]
        for column, shape in PLACES.items():
            _expect(tensors, column, torch.int64, (pairs, *shape))
        members = {size: np.flatnonzero(_is(tensors, size)) for size in _sizes(tensors)}
        if sum(map(len, members.values())) != pairs:
            raise _Fault("pairs of a size without latents")
        for size, rows in members.items():
            self._check_latents(tensors, size, len(rows))
            if (tensors["row"].numpy()[rows] != np.arange(len(rows))).any():
                raise _Fault("pairs do not point at latents of their own")
        index = tensors["index"].numpy()
        if (np.diff(index, prepend=self._last) <= 0).any():
            raise _Fault("its pairs are not in the order of the table")
        self._last = int(index[-1]) if pairs else self._last
        self._ids.append(tensors["pair_id"].numpy())

    def _check_latents(self, tensors: dict[str, Tensor], size: tuple[int, int], count: int) -> None:
        variants = 2 if self._key["mirrored"] else 1
        for name in ("mean", "logvar"):
            full = f"{name}/{size[0]}x{size[1]}"
            if full not in tensors:
                raise _Fault(f"it has no {full}")
            shape = tuple(tensors[full].shape)
            channels, height, width = shape[-3:] if len(shape) == 6 else (0, 1, 1)
            found = (channels, size[0] / max(height, 1), size[1] / max(width, 1))
            self._latent = self._latent or found
            _expect(tensors, full, STORED[self._key["stored"]], (count, 2, variants, *shape[-3:]))
            if found != self._latent:
                raise _Fault(f"{full} has the shape {list(shape)}, unlike others")

    def compare(self) -> Iterator[str]:
        ids = np.concatenate([*self._ids, np.zeros(0, np.int64)])
        if len(ids) != self._manifest["pairs"]:
            yield f"it counts {self._manifest['pairs']} pairs, and the files hold {len(ids)}"
        if len(np.unique(ids)) != len(ids):
            yield f"{len(ids) - len(np.unique(ids))} pairs are there twice"
        rows = self.rows()
        if self._last >= rows:
            yield f"pair {self._last} is beyond the {rows} pairs that it counts"

    def rows(self) -> int:
        return int(sum(self._manifest[name] for name in ("pairs", "identical", "bad")))

    def holds(self) -> str:
        left_out = self.rows() - self._manifest["pairs"]
        return f"{self._manifest['pairs']:,} pairs" + (f", {left_out:,} left out" if left_out else "")


class _TextCheck:
    """Files of embeddings, one after the other, and the captions' numbers."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        self._manifest = manifest
        self._form: dict[str, tuple[Any, ...]] = {}
        self._captions: list[int] = []
        self._numbered = 0

    def check(self, name: str, tensors: dict[str, Tensor]) -> None:
        if name == INDEX:
            self._check_numbers(tensors)
            return
        form = {key: (tensor.dtype, *tensor.shape[1:]) for key, tensor in tensors.items()}
        self._form = self._form or form
        counts = {len(tensor) for tensor in tensors.values()}
        if not form or form != self._form or any(kind[0] != torch.float32 for kind in form.values()):
            raise _Fault(f"it holds {form or 'nothing'}, unlike others")
        if len(counts) != 1:
            raise _Fault("its embeddings are of different numbers of captions")
        self._captions.append(counts.pop())

    def _check_numbers(self, tensors: dict[str, Tensor]) -> None:
        self._numbered = len(tensors.get("winner", ()))
        for side in ("winner", "loser"):
            _expect(tensors, side, torch.int64, (self._numbered,))
            if self._numbered and not 0 <= tensors[side].min() <= tensors[side].max() < self._count:
                raise _Fault(f"{side}s have captions that are not among the {self._count}")

    @property
    def _count(self) -> int:
        return int(self._manifest["count"])

    def compare(self) -> Iterator[str]:
        if sum(self._captions) != self._count:
            yield f"it counts {self._count} captions, and the files hold {sum(self._captions)}"
        if len(set(self._captions[:-1])) > 1 or self._captions[-1:] > self._captions[:1]:
            yield "files but the last hold different numbers of captions"
        if INDEX not in self._manifest["files"]:
            yield f"it does not name {INDEX}"

    def rows(self) -> int:
        return self._numbered

    def holds(self) -> str:
        return f"{self._count:,} captions, {self._manifest['truncated']:,} cut"


def _compare_rows(reports: list[PartReport]) -> None:
    """Latents and captions of one set of pairs must be of as many rows."""
    for report in reports:
        beside = [r for r in reports if r.folder.parent == report.folder.parent and r.rows is not None]
        if report.rows is not None and report.folder.name != "latents":
            for other in beside:
                if other.folder.name == "latents" and other.rows != report.rows:
                    report.add(INDEX, f"it has captions of {report.rows} rows, and there are {other.rows}")


def _count(problems: list[tuple[Path, str]]) -> str:
    return f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"


def _sizes(tensors: dict[str, Tensor]) -> list[tuple[int, int]]:
    found = {_LATENT.fullmatch(name) for name in tensors if name not in PLACES}
    if None in found:
        raise _Fault("it holds tensors that are neither latents nor about pairs")
    return sorted({(int(match[2]), int(match[3])) for match in found if match is not None})


def _is(tensors: dict[str, Tensor], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    return (tensors["size"].numpy() == np.array(size)).all(axis=1)


def _expect(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = tensors.get(name)
    if tensor is None:
        raise _Fault(f"it has no {name}")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise _Fault(
            f"{name} is {tensor.dtype} {list(tensor.shape)} instead of {dtype} {list(shape)}".replace(
                "torch.", ""
            )
        )
