"""Checkpoints that are whole or absent: RUN/checkpoints/step-N/ with safetensors, JSON and a manifest of
hashes.

Written into a staged folder beside, flushed, the manifest last, then one rename; older ones are removed only
after that, under another name. Whatever moment a kill chooses, the newest checkpoint is complete, and a
step-N that is not was damaged by something else: it is told and set aside, never removed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from diffpref.data.disk import told_when_disk_is_full, told_when_refused
from diffpref.data.tensors import save_tensors
from diffpref.errors import UserError
from diffpref.paths import atomic_write_text, sha256_file, sync_folder

MANIFEST = "manifest.json"
STATE = "state.json"
STAGED, REMOVED = ".staged-", ".removed-"
DAMAGED = "damaged-"
_IS_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
"""Errors that say what is on the disk; all others say that the disk could not be asked."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. step: optimizer steps that went into it."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """The JSON state that was given to `Checkpoints.save`."""
        return dict(json.loads((self.path / STATE).read_text(encoding="utf-8")))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One group of tensors, memory-mapped: copy them before the checkpoint may be rotated away."""
        return load_file(self.path / f"{name}.safetensors")

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").exists()


class Checkpoints:
    """The checkpoints folder of a run. keep: how many of the newest stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]
    ) -> Checkpoint:
        """Write groups of tensors and a JSON state as step-N, then drop the oldest beyond `keep`.

        Raises UserError when the disk is full or refuses: the staged folder is removed, earlier checkpoints
        are untouched.
        """
        target, staged = self.folder / f"step-{step}", self.folder / f"{STAGED}{step}"
        earlier = self._by_step()
        kept = f"{earlier[0].path.name} is intact" if earlier else "there is no earlier checkpoint"
        shutil.rmtree(staged, ignore_errors=True)
        try:
            with (
                told_when_refused(f"checkpoint {target}", kept),
                told_when_disk_is_full(f"checkpoint {target}", kept),
            ):
                staged.mkdir(parents=True)
                for name, group in tensors.items():
                    save_tensors(staged / f"{name}.safetensors", group)
                atomic_write_text(staged / STATE, json.dumps(state, indent=2) + "\n")
                files = {path.name: _entry(path) for path in sorted(staged.iterdir())}
                atomic_write_text(
                    staged / MANIFEST, json.dumps({"step": step, "files": files}, indent=2) + "\n"
                )
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        if os.path.lexists(target):
            self.set_aside(target)
        os.rename(staged, target)
        sync_folder(self.folder)
        for checkpoint in [one for one in self._by_step() if one.step <= step][self.keep :]:
            _remove(checkpoint.path)
        return Checkpoint(target, step)

    def survey(self) -> tuple[Checkpoint | None, dict[Path, str]]:
        """The newest complete checkpoint, and what is wrong with each newer one that is passed over.

        Raises UserError when the disk cannot be read, which says nothing about what is on it.
        """
        faults: dict[Path, str] = {}
        for checkpoint in self._by_step():
            fault = _fault(checkpoint.path, checkpoint.step)
            if not fault:
                return checkpoint, faults
            faults[checkpoint.path] = fault
        return None, faults

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint."""
        return self.survey()[0]

    def clean(self) -> None:
        """Remove what a kill left behind: staged folders, and folders whose removal had begun."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((STAGED, REMOVED)):
                    _delete(path)

    def set_aside(self, path: Path) -> Path:
        """Rename a damaged checkpoint so that it is none any more; returns its new path."""
        place, number = path.with_name(f"{DAMAGED}{path.name}"), 1
        while os.path.lexists(place):
            number += 1
            place = path.with_name(f"{DAMAGED}{path.name}-{number}")
        os.rename(path, place)
        sync_folder(self.folder)
        return place

    def _by_step(self) -> list[Checkpoint]:
        if not self.folder.is_dir():
            return []
        found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in self.folder.iterdir()]
        checkpoints = [Checkpoint(path, int(match[1])) for match, path in found if match]
        return sorted(checkpoints, key=lambda checkpoint: -checkpoint.step)


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def _fault(folder: Path, step: int) -> str:
    """What is wrong with the checkpoint of a step, "" when it is whole. Raises UserError when it cannot be
    read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["step"] != step:
            return f"it was saved as step {manifest['step']}"
        # sizes first: hashing gigabytes to find a short file would be a waste
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
        if STATE not in files:
            return f"{MANIFEST} does not name {STATE}"
        changed = [name for name, entry in files.items() if sha256_file(folder / name) != entry["sha256"]]
        return f"other bytes than were saved in {', '.join(changed)}" if changed else ""
    except OSError as error:
        if error.errno not in _IS_DAMAGE:
            raise UserError(
                f"cannot read the checkpoint {folder}",
                why=str(error),
                fix="see to the disk or the permissions and start again; nothing was changed",
            ) from error
        if not folder.is_dir():
            return "it is no folder"
        return f"{Path(error.filename or folder).name} is missing"
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"


def _remove(folder: Path) -> None:
    """Remove a checkpoint under another name: a kill in between leaves nothing that looks like one."""
    place = folder.with_name(f"{REMOVED}{folder.name}")
    _delete(place)
    os.rename(folder, place)
    _delete(place)


def _delete(path: Path) -> None:
    """Remove a folder, or a link or file in place of one: what a link names stays."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
