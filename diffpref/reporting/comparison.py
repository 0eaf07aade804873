"""Every number of a report: means, differences, win rates, intervals and p-values."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffpref.evaluators import stats
from diffpref.reporting.loading import ScoredFolder

EPSILON = 1e-6
"""Differences up to this are ties: scores are stored as float32."""
SIGNIFICANCE = 0.05
EXTREMES = 5


def compare(folders: list[ScoredFolder], resamples: int = stats.RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """All comparisons of the candidates with the baseline (the first folder), as plain JSON values.

    Holm's correction runs over every candidate and metric of the main table together.
    """
    base, candidates = folders[0], folders[1:]
    metrics, primary = base.metrics, _primary(base)
    averages = {folder.name: _averages(folder, metrics) for folder in folders}
    directions = np.array([1.0 if base.columns[m].higher_is_better else -1.0 for m in metrics])
    prompts = _prompts(base)
    kinds = list(dict.fromkeys(prompt["kind"] for prompt in prompts))
    results = _results(averages, base.name, metrics, directions, resamples, seed)
    _correct(results, [c.name for c in candidates], metrics)
    by_kind = {}
    for kind in kinds:
        chosen = [index for index, prompt in enumerate(prompts) if prompt["kind"] == kind]
        part = {name: values[chosen] for name, values in averages.items()}
        by_kind[kind] = {
            "prompts": len(chosen),
            "results": _results(part, base.name, metrics, directions, resamples, seed),
        }
    for index, prompt in enumerate(prompts):
        prompt["scores"] = {
            name: dict(zip(metrics, _plain(values[index]), strict=True)) for name, values in averages.items()
        }
    _add_images(prompts, folders, metrics)
    column = metrics.index(primary)
    gains = {c.name: _gain(averages, c.name, base.name, column, directions[column]) for c in candidates}
    return {
        "primary": primary,
        "baseline": base.name,
        "candidates": [candidate.name for candidate in candidates],
        "prompt_count": len(prompts),
        "image_count": len(base.rows),
        "confidence": stats.CONFIDENCE,
        "resamples": resamples,
        "resampling_seed": seed,
        "epsilon": EPSILON,
        "metrics": {name: _describe(base, name) for name in metrics},
        "results": results,
        "kinds": by_kind,
        "extremes": {name: _extremes(gain, prompts) for name, gain in gains.items()},
        "prompts": prompts,
    }


def _primary(base: ScoredFolder) -> str:
    return next((name for name in base.evaluators if name in base.metrics), base.metrics[0])


def _averages(folder: ScoredFolder, metrics: list[str]) -> np.ndarray:
    return stats.average_by_prompt(folder.values(metrics), [row["prompt_id"] for row in folder.rows])[1]


def _prompts(base: ScoredFolder) -> list[dict[str, Any]]:
    first = {row["prompt_id"]: row for row in reversed(base.rows)}
    return [{"id": key, "text": first[key]["prompt"], "kind": first[key]["kind"]} for key in sorted(first)]


def _add_images(prompts: list[dict[str, Any]], folders: list[ScoredFolder], metrics: list[str]) -> None:
    """The scores of every single image, under its prompt."""
    by_id = {prompt["id"]: prompt.setdefault("images", []) for prompt in prompts}
    for rows in zip(*(folder.rows for folder in folders), strict=True):
        scores = {
            folder.name: {metric: float(row[metric]) for metric in metrics}
            for folder, row in zip(folders, rows, strict=True)
        }
        by_id[rows[0]["prompt_id"]].append({"id": rows[0]["id"], "seed": rows[0]["seed"], "scores": scores})


def _results(
    averages: dict[str, np.ndarray],
    base: str,
    metrics: list[str],
    directions: np.ndarray,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Per model and metric. One set of resamples serves all of them, so that columns stay paired."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, values in averages.items():
        if name == base:
            intervals = stats.bootstrap_means(values, resamples, seed=seed)
            results[name] = {
                metric: {"mean": float(values[:, k].mean()), "interval": _plain(intervals[k])}
                for k, metric in enumerate(metrics)
            }
            continue
        difference = values - averages[base]
        better = difference * directions  # positive where the candidate is the better one
        outcome = stats.outcome_scores(better, EPSILON)
        intervals = stats.bootstrap_means(np.hstack([values, difference, outcome]), resamples, seed=seed)
        p_values = stats.sign_flip_p(better, resamples, seed=seed)
        count = len(metrics)
        results[name] = {
            metric: {
                "mean": float(values[:, k].mean()),
                "interval": _plain(intervals[k]),
                "difference": float(difference[:, k].mean()),
                "difference_interval": _plain(intervals[count + k]),
                **_outcomes(better[:, k]),
                "win_rate_interval": _plain(intervals[2 * count + k]),
                "p": float(p_values[k]),
                "better": bool(better[:, k].mean() > 0),
            }
            for k, metric in enumerate(metrics)
        }
    return results


def _outcomes(better: np.ndarray) -> dict[str, Any]:
    outcomes = stats.count_outcomes(better, EPSILON)
    return {
        "wins": outcomes.wins,
        "ties": outcomes.ties,
        "losses": outcomes.losses,
        "win_rate": outcomes.win_rate,
        "win_rate_wilson": list(stats.wilson_interval(outcomes.win_rate, outcomes.total)),
    }


def _correct(results: dict[str, Any], candidates: list[str], metrics: list[str]) -> None:
    cells = [results[name][metric] for name in candidates for metric in metrics]
    for cell, adjusted in zip(cells, stats.holm([cell["p"] for cell in cells]), strict=True):
        cell["p_holm"] = float(adjusted)
        clear = adjusted < SIGNIFICANCE
        cell["verdict"] = ("better" if cell["better"] else "worse") if clear else "no clear difference"


def _gain(averages: dict[str, np.ndarray], name: str, base: str, column: int, direction: float) -> np.ndarray:
    return (averages[name][:, column] - averages[base][:, column]) * direction


def _extremes(gain: np.ndarray, prompts: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Prompts on which a candidate gained and lost most in the primary metric; ties are neither."""
    order = np.argsort(-gain, kind="stable")
    best = [int(i) for i in order[:EXTREMES] if gain[i] > EPSILON]
    worst = [int(i) for i in order[::-1][:EXTREMES] if gain[i] < -EPSILON]
    return {
        key: [{"id": prompts[i]["id"], "text": prompts[i]["text"], "gain": float(gain[i])} for i in chosen]
        for key, chosen in (("best", best), ("worst", worst))
    }


def _describe(base: ScoredFolder, name: str) -> dict[str, Any]:
    column = base.columns[name]
    return {
        "label": column.label,
        "meaning": column.meaning,
        "higher_is_better": column.higher_is_better,
        "share": column.share,
    }


def _plain(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]
