"""Where a run's numbers go: metrics.jsonl always, tensorboard and Weights & Biases when asked."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffpref.config import LogConfig
from diffpref.errors import UserError
from diffpref.paths import atomic_write_bytes, atomic_write_text

log = logging.getLogger("diffpref")

TIMING_KEYS = ("pairs_per_second", "peak_memory_gb")
"""Keys of metrics.jsonl that depend on the machine; all others are the same after a kill and a resume."""

Row = dict[str, Any]


def check_trackers(log: LogConfig) -> None:
    """Raise UserError when a tracker that is asked for is not installed."""
    for wanted, module, key in (
        (log.tensorboard, "tensorboard", "tensorboard"),
        (log.wandb, "wandb", "wandb"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise UserError(
                f"log.{key} is true, but the package {module} is not installed",
                fix=f"pip install {module}, or set log.{key} = false",
            )


class Metrics:
    """RUN/metrics.jsonl: one JSON object a line, each with its "step"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """All rows that can be read; a line that a kill tore, or that is no row, is left out."""
        return [row for row in map(_parse, self._lines()) if row is not None]

    def truncate(self, step: int) -> None:
        """Drop rows beyond `step`, which the resumed run writes again, and a last line that a kill tore.

        Other damaged lines are left out with a warning; the file as it was stays beside this one.
        """
        lines = self._lines()
        rows = [_parse(line) for line in lines]
        if None in rows:
            damaged = self.path.with_name(f"{self.path.name}.damaged")
            atomic_write_bytes(damaged, b"".join(lines))
            log.warning("%s has damaged lines: they are left out, and %s keeps them", self.path, damaged.name)
        pairs = zip(lines, rows, strict=True)
        kept = [line for line, row in pairs if row is not None and row["step"] <= step]
        atomic_write_bytes(self.path, b"".join(kept))

    def _lines(self) -> list[bytes]:
        """Whole lines, with their ends."""
        try:
            return [line + b"\n" for line in self.path.read_bytes().split(b"\n")[:-1]]
        except FileNotFoundError:
            return []

    def append(self, row: Row) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(_line(row))

    def sync(self) -> None:
        """Flush to the disk: called before a checkpoint that takes these rows for granted."""
        if self.path.exists():
            with open(self.path, "a", encoding="utf-8") as stream:
                os.fsync(stream.fileno())


class Trackers:
    """Sends every row to metrics.jsonl and to the trackers of the config. Used by the main process only."""

    def __init__(self, run: Path, log: LogConfig, config: Mapping[str, Any], step: int) -> None:
        """step: the step that the run continues from; later rows of an earlier attempt are dropped
        everywhere."""
        self.metrics = Metrics(run / "metrics.jsonl")
        self.metrics.truncate(step)
        self._board: Any = None
        self._wandb: Any = None
        if log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        if log.wandb:
            import wandb

            self._wandb = wandb.init(
                project=log.wandb_project,
                name=run.name,
                id=_wandb_id(run),
                resume="allow",
                config=dict(config),
                dir=str(run),
            )

    def write(self, row: Row) -> None:
        self.metrics.append(row)
        flat = _flatten(row)
        step = flat.pop("step")
        if self._board is not None:
            for name, value in flat.items():
                self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory held so far: of the GPU on CUDA, of this process elsewhere. In units of 2**30 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _wandb_id(run: Path) -> str:
    """The same run folder continues the same W&B run."""
    path = run / "wandb-id.txt"
    if not path.exists():
        atomic_write_text(path, os.urandom(6).hex())
    return path.read_text().strip()


def _flatten(row: Row) -> Row:
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": item for name, item in value.items()}
        else:
            flat[key] = value
    return flat


def _parse(line: bytes) -> Row | None:
    """The row of a line, None when it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
