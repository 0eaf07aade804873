"""The run folder: whether it may be used, what it continues from, and its config and manifest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from diffpref.config import TrainConfig, config_difference, load_train_config, to_toml
from diffpref.errors import UserError
from diffpref.paths import atomic_write_text, home_path, remove_abandoned, shown
from diffpref.training.checkpoint import Checkpoint, Checkpoints
from diffpref.training.export import exported_step

log = logging.getLogger("diffpref")

CONFIG, MANIFEST, METRICS = "config.toml", "manifest.json", "metrics.jsonl"
ATTEMPTS = 10  # to lock a folder that another process removes at the same moment
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}  # what a file system without locks answers
MAY_CHANGE = ("output", "checkpoint.", "log.", "sampling.every:", "data.cache_dir", "data.workers", "export.")
"""Settings that a resumed run may change: they alter neither the weights nor the metrics."""


class RunFolder:
    """RUN of one config. Nothing is written before `open`."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.path = config, home_path(config.output)
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.checkpoint.keep)
        self._made = False
        self._faults: dict[Path, str] = {}
        self._lock: int | None = None

    def find_start(self, world_size: int) -> Checkpoint | None:
        """The checkpoint to continue from, None to begin. Call it once the folder is locked by `open`: a
        process that ends beside this one has saved and removed checkpoints until then.

        Raises UserError: the folder holds a run of another config or world size, one that has no checkpoint
        which can be used, or any run while checkpoint.resume is "never".
        """
        if self.checkpoints.folder.exists() and not self.checkpoints.folder.is_dir():
            raise UserError(f"{self.checkpoints.folder} is a file", fix="move it, or choose another output")
        checkpoint, self._faults = self.checkpoints.survey()
        self._refuse_lost(checkpoint)
        if checkpoint is None and not (self.path / METRICS).exists():
            return None
        if self.config.checkpoint.resume == "never":
            raise UserError(
                f"{self.path} holds a run already",
                why='checkpoint.resume is "never"',
                fix='choose another output, remove it, or continue it with checkpoint.resume = "auto"',
            )
        if checkpoint is None and not (self.path / CONFIG).exists():
            return None
        self._refuse_other_config(checkpoint)
        before = checkpoint.state()["world_size"] if checkpoint is not None else world_size
        if before != world_size:
            raise UserError(
                f"{self.path} was trained by {before} process(es), now there are {world_size}",
                why="sums in another order would not continue the same run",
                fix=f"launch {before} process(es), or choose another output",
            )
        return checkpoint

    def _refuse_lost(self, checkpoint: Checkpoint | None) -> None:
        """Raise UserError where to begin would train again, unasked, what the folder has lost."""
        anew = f"restore it, choose another output, or move {self.path} away to start over"
        if checkpoint is None and self._faults:
            faults = "; ".join(f"{path.name}: {fault}" for path, fault in self._faults.items())
            raise UserError(f"no checkpoint of {self.path} can be used", why=faults, fix=anew)
        if checkpoint is not None and not (self.path / CONFIG).exists():
            raise UserError(f"{self.path} has checkpoints and no {CONFIG}", fix=anew)
        if checkpoint is None and exported_step(self.path):
            raise UserError(f"{self.path} has a trained model and no checkpoint", fix=anew)

    def is_finished(self, start: Checkpoint) -> bool:
        """Whether the run came to its end, at the last step or early, and its model is exported."""
        ended = start.step == self.config.train.steps or bool(start.state()["stopped_early"])
        return ended and exported_step(self.path) == start.step

    def open(self) -> None:
        """Create the folder and lock it against a second process. Raises UserError when one is at work in
        it, or the folder cannot be used."""
        name = shown(self.path)
        if os.path.exists(self.path) and not self.path.is_dir():
            raise UserError(f"output {name} is a file", fix="name a folder")
        try:
            for _ in range(ATTEMPTS):
                if self._take():
                    remove_abandoned(self.path)
                    return
                self._release()
        except BlockingIOError:
            self._release()
            raise UserError(
                f"another process is training in {name}", fix="wait for it, or choose another output"
            ) from None
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            self._release()
            why = str(getattr(error, "strerror", None) or error)
            raise UserError(f"cannot use the output folder {name}", why=why) from error
        raise UserError(
            f"cannot use the output folder {name}",
            why="it is a link to nothing, or another process keeps removing it",
            fix="choose another output",
        )

    def _take(self) -> bool:
        """Lock the folder; False when another process removed it between the two steps."""
        self._made = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.path.mkdir()
            self._made = True
        try:
            self._lock = os.open(self.path, os.O_RDONLY)
            self._lock_it(self._lock)
            return os.path.samestat(os.fstat(self._lock), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _lock_it(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s cannot be locked (%s): let no other process train in it", self.path, error)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def close(self, undo: bool = False) -> None:
        """Unlock the folder. One of this run's making goes if nothing is in it, or with `undo` as it is."""
        if self._lock is not None and self._made:
            if undo:
                shutil.rmtree(self.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
        self._release()

    def begin(self, manifest: dict[str, Any], start: Checkpoint | None) -> None:
        """Write config and manifest, clear what a kill left and set damaged checkpoints aside. Raises
        UserError when the inputs have changed."""
        if start is not None:
            self._refuse_other_inputs(manifest["inputs"])
        self.checkpoints.clean()
        for path, fault in self._faults.items():
            place = self.checkpoints.set_aside(path)
            log.warning("checkpoint %s is damaged (%s): passed over, now %s", path.name, fault, place)
        if start is None:  # grids of an attempt that may have been of another config
            shutil.rmtree(self.path / "samples", ignore_errors=True)
        atomic_write_text(self.path / CONFIG, to_toml(self.config))
        self.write_manifest(manifest)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        atomic_write_text(self.path / MANIFEST, json.dumps(manifest, indent=2) + "\n")

    def _refuse_other_config(self, checkpoint: Checkpoint | None) -> None:
        before = load_train_config(self.path / CONFIG)
        changed = [line for line in config_difference(before, self.config) if not line.startswith(MAY_CHANGE)]
        train = self.config.train
        if checkpoint is not None and train.schedule == "constant" and train.steps >= checkpoint.step:
            # A constant schedule does not depend on the number of steps: the run may go on for longer.
            changed = [line for line in changed if not line.startswith("train.steps:")]
        if changed:
            raise UserError(
                f"{self.path} holds a run of another config",
                why="; ".join(changed),
                fix="choose another output, undo the change, or remove the folder to start over",
            )

    def _refuse_other_inputs(self, inputs: dict[str, Any]) -> None:
        manifest = self.path / MANIFEST
        try:
            before = dict(json.loads(manifest.read_text(encoding="utf-8"))["inputs"])
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise UserError(
                f"cannot tell whether the inputs of the run {self.path} are those that it began with",
                why=f"{manifest} cannot be read: {error}",
                fix="restore it, or choose another output",
            ) from error
        changed = sorted(name for name in {**before, **inputs} if before.get(name) != inputs.get(name))
        if changed:
            raise UserError(
                f"the inputs of the run {self.path} have changed since it began",
                why=f"other contents now: {', '.join(changed)}",
                fix="restore them, or choose another output",
            )
