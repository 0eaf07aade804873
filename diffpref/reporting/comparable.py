"""Whether scored folders may be compared, and what a forced comparison compares."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpref.errors import UserError
from diffpref.generation import settings_difference

if TYPE_CHECKING:
    from diffpref.reporting.loading import ScoredFolder

Row = dict[str, Any]


def check_comparable(base: ScoredFolder, other: ScoredFolder, force: bool = False) -> list[str]:
    """How the sampling settings, prompts and seeds of `other` differ from those of `base`, a line each.

    Raises UserError naming every difference: of evaluators always, since their scores are other quantities;
    of settings unless forced.
    """
    judged = settings_difference(_judged_by(base), _judged_by(other))
    if judged:
        raise UserError(
            f"{base.name} and {other.name} cannot be compared: they were scored differently",
            why="; ".join(judged),
            fix="score both with the same evaluators",
        )
    differences = settings_difference(_sampled_with(base), _sampled_with(other))
    differences += _prompt_differences(base.rows, other.rows, base.name, other.name)
    if differences and not force:
        raise UserError(
            f"{base.name} and {other.name} cannot be compared: their images were made differently",
            why="; ".join(differences),
            fix="draw both with the same suite, or compare them all the same with --force",
        )
    return differences


def align(folders: list[ScoredFolder]) -> None:
    """Cut the rows of all folders to shared images: of each prompt that all have, the first so many of each.

    Their order and the numbers of the prompts are those of the first folder. Raises UserError when no prompt
    is shared.
    """
    keyed = [_numbered(folder.rows) for folder in folders]
    shared = set.intersection(*map(set, keyed))
    if not shared:
        names = ", ".join(folder.name for folder in folders)
        raise UserError(f"{names} have no prompt in common", fix="draw the same suite with each model")
    order = [(key, row["prompt_id"]) for key, row in keyed[0].items() if key in shared]
    for folder, rows in zip(folders, keyed, strict=True):
        folder.rows = [{**rows[key], "prompt_id": prompt_id} for key, prompt_id in order]


def _judged_by(folder: ScoredFolder) -> dict[str, Any]:
    return {
        "evaluators": {
            name: {key: about.get(key) for key in ("version", "fingerprint", "dtype")}
            for name, about in folder.evaluators.items()
        },
        "columns": dict.fromkeys(folder.columns, "scored"),
    }


def _sampled_with(folder: ScoredFolder) -> dict[str, Any]:
    """Scheduler, steps, guidance, size, negative prompt, seeds, precision and file format."""
    formats = sorted({Path(row["file"]).suffix.lower() for row in folder.rows})
    return {
        "suite": folder.manifest.get("suite"),
        "dtype": folder.manifest.get("dtype"),
        "file_format": ", ".join(formats),
    }


def _prompt_differences(base: list[Row], other: list[Row], base_name: str, other_name: str) -> list[str]:
    left, right = ({row["id"]: (row["prompt"], row["seed"]) for row in rows} for rows in (base, other))
    if left.keys() != right.keys():
        only_left, only_right = len(left.keys() - right.keys()), len(right.keys() - left.keys())
        return [f"images: {only_left} only in {base_name}, {only_right} only in {other_name}"]
    changed = [key for key in left if left[key] != right[key]]
    if not changed:
        return []
    key = changed[0]
    return [f"prompts or seeds: {len(changed)} differ, first {key}: {left[key]} -> {right[key]}"]


def _numbered(rows: list[Row]) -> dict[tuple[str, int], Row]:
    """Rows by prompt and by how many of its images come before."""
    seen: Counter[str] = Counter()
    numbered = {}
    for row in rows:
        numbered[row["prompt"], seen[row["prompt"]]] = row
        seen[row["prompt"]] += 1
    return numbered
