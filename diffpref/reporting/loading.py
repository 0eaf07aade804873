"""Scored folders as the report reads them, and whether they may be compared at all."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.errors import UserError
from diffpref.evaluators.base import Column
from diffpref.files import parse_json
from diffpref.generation import read_manifest
from diffpref.reporting.comparable import align, check_comparable
from diffpref.scoring import ERROR, IDENTITY

_GENERIC_NAMES = {"images", "generated", "samples", "out", "eval"}


@dataclass
class ScoredFolder:
    """One model's images, scores and training run. ``rows`` are sorted by prompt and seed.

    differences: how its sampling settings differ from the baseline's, in a forced comparison.
    """

    path: Path
    name: str
    manifest: dict[str, Any]
    evaluators: dict[str, Any]
    rows: list[dict[str, Any]]
    training: TrainingRun | None = None
    differences: list[str] = field(default_factory=list)

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Every score column in the table, described by its evaluator or, failing that, by its name."""
        described = {
            name: column
            for evaluator in self.evaluators.values()
            for name, about in evaluator.get("columns", {}).items()
            if (column := _column(about)) is not None
        }
        present = [name for name in self.rows[0] if name not in (*IDENTITY, ERROR)]
        known = [name for name in described if name in present]
        return {name: described.get(name) or self._undescribed(name) for name in [*known, *present]}

    def _undescribed(self, name: str) -> Column:
        evaluator = self.evaluators.get(name.split(".")[0], {})
        text = any(isinstance(row[name], str) for row in self.rows)
        scale = str(evaluator.get("scale", ""))
        return Column(name, scale, evaluator.get("higher_is_better", True), per_image=text)

    @property
    def metrics(self) -> list[str]:
        """Columns of numbers that are averaged, the evaluators' own scores among them."""
        return [name for name, column in self.columns.items() if not column.per_image]

    def values(self, names: list[str]) -> np.ndarray:
        """[N, K] float64, one row per image; NaN where an image has no score."""
        try:
            return np.array([[row[name] for name in names] for row in self.rows], dtype=np.float64)
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"the scores of {self.path} are not all numbers", why=str(error), fix="score it again"
            ) from error


@dataclass(frozen=True)
class TrainingRun:
    """What a training run left behind: its metrics by step and its resolved config."""

    path: Path
    config: str
    series: dict[str, tuple[list[int], list[float]]] = field(repr=False)


def load_folders(
    baseline: Path,
    candidates: list[Path],
    force: bool = False,
    names: Sequence[str] = (),
    prompts: Collection[str] | None = None,
) -> list[ScoredFolder]:
    """The baseline and the candidates, in this order, their rows of the same prompts in the same order.

    force: compare folders whose sampling settings, prompts or seeds differ, over what they share.
    names: of the models; by default those of their folders. prompts: texts; others are left out.

    Raises:
        UserError: a folder without scores, scores that do not belong to its images, folders scored by
            different evaluators, or, unless forced, made differently (every difference is named).
    """
    if not candidates:
        raise UserError("there is nothing to compare", fix="give --candidate DIR, more than once if you like")
    paths = [baseline, *candidates]
    resolved = [path.resolve() for path in paths]
    for position, path in enumerate(resolved):
        if path in resolved[:position]:
            raise UserError(f"{paths[position]} was given twice", fix="compare different folders")
    folders = [_load(path, name) for path, name in zip(paths, names or _names(resolved), strict=True)]
    if prompts is not None:
        for folder in folders:
            folder.rows = [row for row in folder.rows if row["prompt"] in prompts]
            if not folder.rows:
                raise UserError(
                    f"{folder.path} has none of the prompts", fix="draw the same suite with each model"
                )
    for folder in folders[1:]:
        folder.differences = check_comparable(folders[0], folder, force)
    align(folders)
    return folders


def _load(path: Path, name: str) -> ScoredFolder:
    if not path.is_dir():
        raise UserError(f"there is no folder {path}", fix="give folders made by diffpref generate and score")
    scores = path / "scores.parquet"
    if not scores.is_file():
        raise UserError(
            f"{path} is not scored", why="scores.parquet is missing", fix=f"diffpref score {path}"
        )
    try:
        rows = pq.read_table(scores).to_pylist()
        evaluators = _evaluators(parse_json((path / "scores.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"the scores of {path} cannot be read", why=str(error), fix="score it again"
        ) from error
    manifest = read_manifest(path)
    if not rows or not set(IDENTITY) <= rows[0].keys():
        raise UserError(f"{scores} is not a table of diffpref score", fix=f"diffpref score {path}")
    odd = [name for name, kind in _KINDS.items() if any(not isinstance(row[name], kind) for row in rows)]
    if odd:
        raise UserError(
            f"{scores} is not a table of diffpref score", why=f"odd values in {', '.join(odd)}",
            fix=f"diffpref score {path}",
        )  # fmt: skip
    rows.sort(key=lambda row: (row["prompt_id"], row["id"]))
    return ScoredFolder(path, name, manifest, evaluators, rows, _training(path, manifest))


_KINDS: dict[str, type | tuple[type, ...]] = {"id": str, "prompt_id": int, "prompt": str, "kind": str}


def _evaluators(found: Any) -> dict[str, dict[str, Any]]:
    """What scores.json says of each evaluator. Raises ValueError for another shape; keys that a newer version
    added do no harm."""
    evaluators = found["evaluators"]
    if not isinstance(evaluators, dict):
        raise ValueError("its evaluators are no object")
    for name, about in evaluators.items():
        if not isinstance(about, dict) or not isinstance(about.get("columns", {}), dict):
            raise ValueError(f"what it says of the evaluator {name!r} is no object")
        for key in ("version", "fingerprint"):
            if not isinstance(about.get(key), str):
                raise ValueError(f"it has no {key} of the evaluator {name!r}")
        if not isinstance(about.get("higher_is_better", True), bool):
            raise ValueError(f"higher_is_better of the evaluator {name!r} is not true or false")
    return dict(evaluators)


def _column(described: Any) -> Column | None:
    """The fields of a column that this version knows; None where there is no description to read."""
    if not isinstance(described, dict):
        return None
    kinds = {field.name: str if field.name in ("label", "meaning") else bool for field in fields(Column)}
    known = {name: described[name] for name, kind in kinds.items() if isinstance(described.get(name), kind)}
    return Column(**known) if {"label", "meaning"} <= known.keys() else None


def _names(paths: list[Path]) -> list[str]:
    """Short distinct names: the folders' own, or the parents' where they say more ("dpo/images" is "dpo"), or
    what their paths do not share."""
    for depth in range(3):
        names = [path.parts[-1 - depth] if len(path.parts) > depth else str(path) for path in paths]
        if len(set(names)) == len(names) and not set(names) & _GENERIC_NAMES:
            return names
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


def _training(path: Path, manifest: dict[str, Any]) -> TrainingRun | None:
    """The run that the model came from, where it is still to be found."""
    run = manifest.get("run")
    if not run or not isinstance(run, str):
        return None
    for place in (Path(run), path.parent, path.parent / Path(run).name):
        metrics = place / "metrics.jsonl"
        if metrics.is_file():
            config = place / "config.toml"
            text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
            return TrainingRun(place, text, _series(metrics))
    return None


def _series(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        step = row.pop("step", None) if isinstance(row, dict) else None
        if not isinstance(step, int):
            continue
        held_out = row.pop("validation", None)
        if isinstance(held_out, dict):
            row |= {f"validation.{key}": value for key, value in held_out.items()}
        for key, value in row.items():
            if isinstance(value, int | float) and abs(value) < 1e300:
                steps, values = series.setdefault(key, ([], []))
                steps.append(step)
                values.append(float(value))
    return series
