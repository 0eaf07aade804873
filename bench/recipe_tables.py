"""Markdown tables of finished combinations: seeds are averaged within a prompt, and prompts are resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpref.evaluators import stats
from diffpref.reporting import formatting as show
from diffpref.reporting.comparison import EPSILON
from diffpref.reporting.loading import ScoredFolder


@dataclass(frozen=True)
class Finished:
    """A judged combination: [prompts, metrics], averaged over a prompt's images, and its line of results."""

    setting: str
    seed: int
    values: np.ndarray
    row: dict[str, Any]


def tables(base: ScoredFolder, finished: Sequence[Finished], against: str = "") -> str:
    """The main table; differences by seed where a setting has several; the comparison with `against`."""
    groups: dict[str, list[Finished]] = {}
    for item in finished:
        groups.setdefault(item.setting, []).append(item)
    _, base_values = stats.average_by_prompt(
        base.values(base.metrics), [row["prompt_id"] for row in base.rows]
    )
    parts = [_main_table(base, base_values, groups)]
    if any(len(group) > 1 for group in groups.values()):
        parts.append(_seed_table(base, base_values, groups))
    if against in groups and len(groups) > 1:
        parts.append(_against_table(base, groups, against))
    return "\n\n".join(parts)


def pooled(group: Sequence[Finished]) -> np.ndarray:
    """[prompts, metrics]: mean over the seeds of a setting."""
    return np.mean([item.values for item in group], axis=0)


def win_rate(group: Sequence[Finished], other: np.ndarray, column: int, direction: float) -> np.ndarray:
    """[prompts]: share of the setting's seeds that beat `other` on the prompt, ties counted half."""
    differences = [direction * (item.values[:, column] - other[:, column]) for item in group]
    return np.mean([stats.outcome_scores(difference, EPSILON) for difference in differences], axis=0)


def _main_table(base: ScoredFolder, base_values: np.ndarray, groups: dict[str, list[Finished]]) -> str:
    shares = [base.columns[name].share for name in base.metrics]
    head = ["setting", "seeds", *_labels(base), f"win rate ({_labels(base)[0]})"]
    head += ["winner gain", "loser gain", "training"]
    ends = stats.bootstrap_means(base_values)
    cells = [
        f"{show.number(mean, share)} ({show.interval(end, share)})"
        for mean, end, share in zip(base_values.mean(axis=0), ends, shares, strict=True)
    ]
    lines = [["base", "", *cells, "", "", "", ""]]
    for setting, group in groups.items():
        lines.append([setting, str(len(group)), *_compared(base, pooled(group), base_values)])
        lines[-1] += [
            _rate(base, group, base_values),
            _mean(group, "winner_gain"),
            _mean(group, "loser_gain"),
        ]
        lines[-1].append(_duration(float(np.mean([item.row["training_seconds"] for item in group]))))
    suite, prompts, images = base.manifest["suite"]["name"], len(base_values), len(base.rows)
    note = (
        f"Suite {suite}, {prompts} prompts, {images} images a model. In brackets: 95 % bootstrap interval "
        "over prompts; for a setting the difference to base, then its interval."
    )
    return f"{_markdown(head, lines)}\n\n{note}"


def _seed_table(base: ScoredFolder, base_values: np.ndarray, groups: dict[str, list[Finished]]) -> str:
    shares = [base.columns[name].share for name in base.metrics]
    lines = []
    for setting, group in groups.items():
        changes = [(item.values - base_values).mean(axis=0) for item in group]
        cells = [
            ", ".join(show.change(change[k], share) for change in changes) for k, share in enumerate(shares)
        ]
        lines.append([setting, ", ".join(str(item.seed) for item in group), *cells])
    head = ["difference to base, by training seed", "seeds", *_labels(base)]
    return _markdown(head, lines)


def _against_table(base: ScoredFolder, groups: dict[str, list[Finished]], against: str) -> str:
    other = pooled(groups[against])
    lines = [
        [setting, *_compared(base, pooled(group), other), _rate(base, group, other)]
        for setting, group in groups.items()
        if setting != against
    ]
    head = [f"against {against}", *_labels(base), f"win rate ({_labels(base)[0]})"]
    return _markdown(head, lines)


def _compared(base: ScoredFolder, values: np.ndarray, other: np.ndarray) -> list[str]:
    """A cell per metric: mean, difference to `other`, its interval."""
    difference = values - other
    ends = stats.bootstrap_means(difference)
    cells = []
    for k, name in enumerate(base.metrics):
        share = base.columns[name].share
        change = show.change(float(difference[:, k].mean()), share)
        mean = show.number(float(values[:, k].mean()), share)
        cells.append(f"{mean} ({change}; {show.change_interval(ends[k], share)})")
    return cells


def _rate(base: ScoredFolder, group: Sequence[Finished], other: np.ndarray) -> str:
    direction = 1.0 if base.columns[base.metrics[0]].higher_is_better else -1.0
    outcomes = win_rate(group, other, 0, direction)
    ends = stats.bootstrap_means(outcomes).tolist()
    return f"{show.number(float(outcomes.mean()), True)} ({show.interval(ends, True)})"


def _labels(base: ScoredFolder) -> list[str]:
    return [base.columns[name].label for name in base.metrics]


def _mean(group: Sequence[Finished], key: str) -> str:
    values = [item.row[key] for item in group if item.row.get(key) is not None]
    return f"{np.mean(values):+.2e}".replace("-", show.MINUS) if values else show.DASH


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.1f} min"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
