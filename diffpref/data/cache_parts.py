"""The parts of a cache: which files each has, what they depend on, and what its manifest says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from diffpref.config import DataConfig
from diffpref.data.cached import INDEX, MANIFEST, REPAIR
from diffpref.data.encoding import ABOUT, Task, digest_path, pack
from diffpref.data.pairs import IDENTICAL, PairTable
from diffpref.data.parts import staged
from diffpref.data.schema import caption_columns
from diffpref.errors import UserError
from diffpref.families.base import Family
from diffpref.paths import atomic_write_text, fingerprint, sha256_file

FORMAT = 3
SHARD_PAIRS = 256
SHARD_CAPTIONS = 256
NAMED_BAD_ROWS = 20


class Part:
    """One part of a cache. `key` holds all that shapes its files, `key_hash` stands in each of them."""

    what: str
    unit: str

    def __init__(
        self, table: PairTable, family: Family, data: DataConfig, folder: Path, pairs: dict[str, Any]
    ) -> None:
        """pairs: what identifies the pairs."""
        self.table, self.family, self.data, self.folder = table, family, data, folder
        self.key = {"format": FORMAT, **pairs, **self.settings()}
        self.key_hash = fingerprint(self.key)
        self._tasks: list[Task] | None = None

    def settings(self) -> dict[str, Any]:
        raise AssertionError("each part names what shapes it")

    def plan(self) -> Iterator[Task]:
        raise AssertionError("each part plans its files")

    def files(self) -> list[Path]:
        """Every file of the part, once all that take encoding are there."""
        return [task.path for task in self.tasks]

    def summary(self) -> dict[str, Any]:
        raise AssertionError("each part sums itself up")

    @property
    def tasks(self) -> list[Task]:
        """Every file that takes encoding, made or not."""
        if self._tasks is None:
            self._tasks = list(self.plan())
        return self._tasks

    def finished(self) -> bool:
        """Whether the manifest is there, and every file that it names. Nothing is read but sizes.

        Raises UserError: a file has another size than the manifest says.
        """
        manifest = read_manifest(self.folder)
        if manifest is None or any(self.folder.glob("*.sha256")):
            return False
        for name, about in manifest["files"].items():
            try:
                found = (self.folder / name).stat().st_size
            except FileNotFoundError:
                return False
            if found != about["size"]:
                why = f"it has {found:,} bytes instead of {about['size']:,}"
                raise UserError(f"{self.folder / name} is damaged", why, REPAIR)
        return True

    def missing(self, first: int = 0, step: int = 1) -> list[Task]:
        """The files to make among every `step`-th from number `first` on."""
        return [] if self.finished() else [t for t in self.tasks[first::step] if not t.path.exists()]

    def finish(self) -> int:
        """Write the manifest when every file is there; the number of those that are not."""
        if self.finished():
            return 0
        missing = sum(not task.path.exists() for task in self.tasks)
        if missing:
            return missing
        files = {path.name: self._about(path) for path in self.files()}
        manifest = {"key": self.key, "key_hash": self.key_hash, **self.summary(), "files": files}
        atomic_write_text(self.folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        remove(self.folder, f".{MANIFEST}.*.tmp", ".*.sha256.*.tmp", "*.sha256")  # these last: see finished
        return 0

    def _about(self, path: Path) -> dict[str, Any]:
        """Size and SHA-256 as it was written: noted beside the file, else in the manifest before. Without
        both it is read again."""
        size = path.stat().st_size
        try:
            return {"size": size, "sha256": digest_path(path).read_text().strip()}
        except FileNotFoundError:
            before = (read_manifest(self.folder) or {"files": {}})["files"].get(path.name)
            return (
                before if before and before["size"] == size else {"size": size, "sha256": sha256_file(path)}
            )


class Latents(Part):
    what, unit = "images", "pair"

    def settings(self) -> dict[str, Any]:
        return {
            "vae": self.family.fingerprint()["vae"],
            "precision": str(self.family.codec.precision),
            "resolution": self.data.resolution,
            "aspect": self.data.aspect,
            "multiple": self.family.side_multiple if self.data.aspect == "buckets" else 1,
            "mirrored": self.data.flip != "none",
            "stored": self.data.latent_precision,
        }

    def plan(self) -> Iterator[Task]:
        total = len(self.table)
        for number in range(-(-total // SHARD_PAIRS)):
            rows = (number * SHARD_PAIRS, min((number + 1) * SHARD_PAIRS, total))
            yield Task(shard_path(self.folder, number), self.key_hash, rows)

    def summary(self) -> dict[str, Any]:
        rows: list[int] = []
        bad: list[list[str]] = []
        for task in self.tasks:
            shapes, about = read_header(task.path)
            rows.append(shapes["pair_id"][0])
            bad += about["bad"]
        identical = [row for row in bad if row[1] == IDENTICAL]
        broken = [row for row in bad if row[1] != IDENTICAL]
        self._check_bad(broken)
        if sum(rows) == 0:
            raise UserError(
                f"no usable pair in {self.data.pairs}", why=f"{len(identical)} pairs of identical images"
            )
        named = [{"row": source, "reason": reason} for source, reason in broken[:NAMED_BAD_ROWS]]
        return {
            "pairs": sum(rows),
            "shards": rows,
            "identical": len(identical),
            "bad": len(broken),
            "first_bad": named,
        }

    def _check_bad(self, broken: list[list[str]]) -> None:
        """The limit over the whole table: a continued build, or one of several processes, saw a part of it
        only."""
        if len(broken) <= self.data.max_bad_share * self.table.stats.rows:
            return
        raise UserError(
            f"{len(broken)} of {self.table.stats.rows} rows cannot be used, more than the share allowed "
            f"(data.max_bad_share = {self.data.max_bad_share:g})",
            why="; ".join(f"{source}: {reason}" for source, reason in broken[:5]),
            fix="repair or remove those rows, or raise data.max_bad_share",
        )


class Text(Part):
    """Each different caption once, in the order of the table; INDEX, written at the end, has the captions'
    numbers of each pair."""

    what, unit = "captions", "caption"

    def settings(self) -> dict[str, Any]:
        columns = caption_columns(self.table.columns, self.table.captions)
        return {"text": self.family.fingerprint()["text"], "captions": [self.table.captions, *columns]}

    def plan(self) -> Iterator[Task]:
        numbers: dict[str, int] = {"": 0}  # the empty prompt, for prompt dropout, is always caption 0
        self._winners = np.zeros(len(self.table), np.int64)
        self._losers = np.zeros(len(self.table), np.int64)
        for index, (winner, loser) in enumerate(self.table.iter_captions()):
            self._winners[index] = numbers.setdefault(winner, len(numbers))
            self._losers[index] = numbers.setdefault(loser, len(numbers))
        captions = tuple(numbers)
        for number, start in enumerate(range(0, len(captions), SHARD_CAPTIONS)):
            texts = captions[start : start + SHARD_CAPTIONS]
            yield Task(shard_path(self.folder, number), self.key_hash, texts=texts)

    def files(self) -> list[Path]:
        tasks, index = self.tasks, self.folder / INDEX
        numbers = {"winner": torch.from_numpy(self._winners), "loser": torch.from_numpy(self._losers)}
        with staged(index) as stream:
            stream.write(pack(numbers, {"key": self.key_hash}))
        return [*(task.path for task in tasks), index]

    def summary(self) -> dict[str, Any]:
        cut = sum(read_header(task.path)[1]["truncated"] for task in self.tasks)
        count = sum(task.size for task in self.tasks)
        return {"count": count, "truncated": cut, "max_tokens": self.family.max_tokens}


def remove(folder: Path, *patterns: str) -> None:
    """Remove files that a kill left, of kinds that nobody else writes now."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a part, None where there is none that can be read: the files speak for themselves."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest["key"]["format"] and manifest["files"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_header(path: Path) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """(shapes of the tensors, what else the header says) of a file. Raises UserError when it is damaged."""
    try:
        with safe_open(path, "pt") as shard:
            shapes = {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118
            return shapes, dict(json.loads(shard.metadata()[ABOUT]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged", f"{type(error).__name__}: {error}", REPAIR) from error
