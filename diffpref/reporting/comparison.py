"""Every number of a report: means, differences, win rates, intervals and p-values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffpref.errors import UserError
from diffpref.evaluators import stats
from diffpref.reporting.distributions import histograms
from diffpref.reporting.formatting import decimals_for
from diffpref.reporting.loading import ScoredFolder
from diffpref.scoring import ERROR

EPSILON = 1e-6
"""Differences up to this are ties: scores are stored as float32."""
SIGNIFICANCE = 0.05
NO_CLEAR_DIFFERENCE = "no clear difference"
EXTREMES = 5

Interval = list[float] | None
"""Lower and upper end; None where a single prompt shows no spread."""


def compare(folders: list[ScoredFolder], resamples: int = stats.RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """All comparisons of the candidates with the baseline (the first folder), as plain JSON values.

    An image without a score in any model or metric is left out of all of them, so that every number is of the
    same prompts. Means and win rates have tests of their own, and Holm's correction runs over those of every
    candidate and metric together: in a table of equal models the chance that any is called better is 5 %.
    A single prompt has no interval (None).

    Raises:
        UserError: no image has a score in every model and metric.
    """
    base, candidates = folders[0], folders[1:]
    metrics, primary = base.metrics, _primary(base)
    complete = _complete(folders, metrics)
    averages = {folder.name: _averages(folder, metrics, complete) for folder in folders}
    columns = [base.columns[metric] for metric in metrics]
    directions = np.array([1.0 if column.higher_is_better else -1.0 for column in columns])
    prompts = _prompts([row for row, whole in zip(base.rows, complete, strict=True) if whole])
    kinds = np.array([prompt["kind"] for prompt in prompts])
    means = _Means(
        kinds,
        np.array([column.over_kinds for column in columns]),
        _yes_or_no(folders, metrics, complete),
        resamples,
        seed,
    )
    results = _results(averages, base.name, metrics, directions, means)
    _correct(results, [c.name for c in candidates], metrics)
    for index, prompt in enumerate(prompts):
        prompt["scores"] = {
            name: dict(zip(metrics, _plain(values[index]), strict=True)) for name, values in averages.items()
        }
    _add_images(prompts, folders, metrics)
    gains = {c.name: (averages[c.name] - averages[base.name]) * directions for c in candidates}
    return {
        "primary": primary,
        "baseline": base.name,
        "candidates": [candidate.name for candidate in candidates],
        "prompt_count": len(prompts),
        "image_count": int(complete.sum()),
        "missing": _missing(folders, metrics, complete),
        "confidence": stats.CONFIDENCE,
        "resamples": resamples,
        "resampling_seed": seed,
        "epsilon": EPSILON,
        "metrics": {name: _describe(base, name, results[base.name][name]["interval"]) for name in metrics},
        "results": results,
        "kinds": _by_kind(averages, base.name, metrics, directions, means),
        "distributions": {
            metric: histograms(
                {name: values[:, k] for name, values in averages.items()},
                {name: gain[:, k] for name, gain in gains.items()},
            )
            for k, metric in enumerate(metrics)
        },
        "extremes": {
            metric: {name: _extremes(gain[:, k], prompts) for name, gain in gains.items()}
            for k, metric in enumerate(metrics)
        },
        "prompts": prompts,
    }


def _primary(base: ScoredFolder) -> str:
    return next((name for name in base.evaluators if name in base.metrics), base.metrics[0])


def _complete(folders: list[ScoredFolder], metrics: list[str]) -> np.ndarray:
    """[N] bool: images with a score in every model and metric."""
    complete = np.all([np.isfinite(folder.values(metrics)).all(axis=1) for folder in folders], axis=0)
    if not complete.any():
        raise UserError(
            "there is nothing to compare",
            why="no image has a score in every folder and metric",
            fix="draw the missing images, and score all folders with the same evaluators",
        )
    return complete


def _missing(folders: list[ScoredFolder], metrics: list[str], complete: np.ndarray) -> dict[str, Any]:
    """What has no score, by model, and what is left out everywhere because of that."""
    base = folders[0]
    images: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        lacking = ~np.isfinite(folder.values(metrics))
        images[folder.name] = [
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "metrics": [metric for metric, lacks in zip(metrics, lacking[index], strict=True) if lacks],
                "reason": row.get(ERROR) or "not scored",
            }
            for index, row in enumerate(folder.rows)
            if lacking[index].any()
        ]
    kept = {row["prompt_id"] for row, whole in zip(base.rows, complete, strict=True) if whole}
    return {
        "left_out_images": int((~complete).sum()),
        "left_out_prompts": len({row["prompt_id"] for row in base.rows}) - len(kept),
        "images": images,
    }


def _yes_or_no(folders: list[ScoredFolder], metrics: list[str], complete: np.ndarray) -> np.ndarray:
    """[K] bool: metrics that are shown as shares and are 0 or 1 for every image."""
    shares = np.array([folders[0].columns[metric].share for metric in metrics])
    sharp = [np.isin(folder.values(metrics)[complete], (0.0, 1.0)).all(axis=0) for folder in folders]
    found: np.ndarray = np.all([shares, *sharp], axis=0)
    return found


def _averages(folder: ScoredFolder, metrics: list[str], complete: np.ndarray) -> np.ndarray:
    ids = np.array([row["prompt_id"] for row in folder.rows])
    return stats.average_by_prompt(folder.values(metrics)[complete], ids[complete])[1]


def _prompts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = {row["prompt_id"]: row for row in reversed(rows)}
    return [{"id": key, "text": first[key]["prompt"], "kind": first[key]["kind"]} for key in sorted(first)]


def _add_images(prompts: list[dict[str, Any]], folders: list[ScoredFolder], metrics: list[str]) -> None:
    """The scores of every single image, under its prompt; null where there is none."""
    by_id = {prompt["id"]: prompt.setdefault("images", []) for prompt in prompts}
    for rows in zip(*(folder.rows for folder in folders), strict=True):
        scores = {
            folder.name: {metric: row[metric] for metric in metrics}
            for folder, row in zip(folders, rows, strict=True)
        }
        if rows[0]["prompt_id"] in by_id:
            image = {"id": rows[0]["id"], "seed": rows[0]["seed"], "scores": scores}
            by_id[rows[0]["prompt_id"]].append(image)


@dataclass(frozen=True)
class _Means:
    """How the prompts of a comparison are averaged. kinds: [P]; over_kinds: [K], metrics whose mean is that
    of the kinds' means; shares: [K], metrics of 0 or 1 for each image. All intervals come from the same
    resamples, so that columns stay paired."""

    kinds: np.ndarray
    over_kinds: np.ndarray
    shares: np.ndarray
    resamples: int
    seed: int

    def of(self, chosen: np.ndarray) -> _Means:
        return replace(self, kinds=self.kinds[chosen])

    def weighted(self, values: np.ndarray) -> np.ndarray:
        """[P, K] values whose plain means are the wanted ones."""
        weights: np.ndarray = np.where(self.over_kinds, stats.kind_weights(self.kinds)[:, None], 1.0)
        return values * weights

    def plain(self) -> _Means:
        """The same for outcomes, which count each prompt alike."""
        return replace(self, over_kinds=np.zeros_like(self.over_kinds))

    def mean(self, values: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.weighted(values).mean(axis=0)
        return found

    def rate_intervals(self, values: np.ndarray) -> list[Interval]:
        """Intervals of the means of values of a model, [P, K]: of shares never narrower than Wilson's."""
        ends = self.intervals(values)
        weights = stats.kind_weights(self.kinds)
        for k in np.flatnonzero(self.shares):
            own = ends[k]
            if own is not None:
                prompts = len(values) / np.square(weights).mean() if self.over_kinds[k] else len(values)
                rate = float(np.clip(self.mean(values)[k], 0.0, 1.0))
                ends[k] = list(stats.rate_interval(own, rate, prompts))
        return ends

    def intervals(self, values: np.ndarray) -> list[Interval]:
        if len(values) < 2:
            return [None] * values.shape[1]
        ends = stats.bootstrap_means(values, self.resamples, seed=self.seed)
        if self.over_kinds.any():
            chosen = values[:, self.over_kinds]
            ends[self.over_kinds] = stats.bootstrap_over_kinds(
                chosen, self.kinds, self.resamples, seed=self.seed
            )
        return [_plain(end) for end in ends]


def _by_kind(
    averages: dict[str, np.ndarray], base: str, metrics: list[str], directions: np.ndarray, means: _Means
) -> dict[str, dict[str, Any]]:
    kinds = {}
    for kind in dict.fromkeys(means.kinds.tolist()):
        chosen = np.flatnonzero(means.kinds == kind)
        part = {name: values[chosen] for name, values in averages.items()}
        results = _results(part, base, metrics, directions, means.of(chosen))
        kinds[kind] = {"prompts": len(chosen), "results": results}
    return kinds


def _results(
    averages: dict[str, np.ndarray], base: str, metrics: list[str], directions: np.ndarray, means: _Means
) -> dict[str, dict[str, dict[str, Any]]]:
    """Per model and metric."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, values in averages.items():
        mean, interval = means.mean(values), means.rate_intervals(values)
        results[name] = {
            metric: {"mean": float(mean[k]), "interval": interval[k]} for k, metric in enumerate(metrics)
        }
        if name == base:
            continue
        difference = values - averages[base]
        better = difference * directions  # positive where the candidate is the better one
        outcome = stats.outcome_scores(better, EPSILON)
        change, change_interval = means.mean(difference), means.intervals(difference)
        win_rates = means.plain().intervals(outcome)
        p_values = stats.sign_flip_p(means.weighted(better), means.resamples, seed=means.seed)
        for k, metric in enumerate(metrics):
            results[name][metric] |= {
                "difference": float(change[k]),
                "difference_interval": change_interval[k],
                **_outcomes(better[:, k], win_rates[k]),
                "p": float(p_values[k]),
                "better": bool(change[k] * directions[k] > 0),
            }
    return results


def _outcomes(better: np.ndarray, resampled: Interval) -> dict[str, Any]:
    outcomes = stats.count_outcomes(better, EPSILON)
    interval = resampled and list(stats.rate_interval(resampled, outcomes.win_rate, outcomes.total))
    return {
        "wins": outcomes.wins,
        "ties": outcomes.ties,
        "losses": outcomes.losses,
        "win_rate": outcomes.win_rate,
        "win_rate_interval": interval,
        "win_rate_p": stats.sign_test_p(outcomes.wins, outcomes.losses),
        "prompts_for_2_points": _prompts_for_2_points(outcomes),
    }


def _prompts_for_2_points(outcomes: stats.Outcomes) -> int:
    """Prompts for a win rate within 2 points either way, at the win rate and share of ties seen here."""
    return stats.prompts_for_win_rate(0.02, outcomes.win_rate, outcomes.ties / outcomes.total)


def _correct(results: dict[str, Any], candidates: list[str], metrics: list[str]) -> None:
    """Add the corrected p-values and what they allow to say: of means `verdict`, of wins `win_verdict`."""
    cells = [results[name][metric] for name in candidates for metric in metrics]
    p_values = [cell[key] for key in ("p", "win_rate_p") for cell in cells]
    of_means, of_wins = np.split(stats.holm(p_values), 2)
    for cell, p, win_p in zip(cells, of_means, of_wins, strict=True):
        cell["p_holm"], cell["win_rate_p_holm"] = float(p), float(win_p)
        cell["verdict"] = _verdict(p, cell["better"])
        cell["win_verdict"] = _verdict(win_p, cell["wins"] > cell["losses"])


def _verdict(p: float, better: bool) -> str:
    if p >= SIGNIFICANCE:
        return NO_CLEAR_DIFFERENCE
    return "better" if better else "worse"


def _extremes(gain: np.ndarray, prompts: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Prompts on which a candidate gained and lost most in a metric; ties are neither."""
    order = np.argsort(-gain, kind="stable")
    best = [int(i) for i in order[:EXTREMES] if gain[i] > EPSILON]
    worst = [int(i) for i in order[::-1][:EXTREMES] if gain[i] < -EPSILON]
    return {
        key: [{"id": prompts[i]["id"], "text": prompts[i]["text"], "gain": float(gain[i])} for i in chosen]
        for key, chosen in (("best", best), ("worst", worst))
    }


def _describe(base: ScoredFolder, name: str, interval: Interval) -> dict[str, Any]:
    column = base.columns[name]
    return {
        "label": column.label,
        "meaning": column.meaning,
        "higher_is_better": column.higher_is_better,
        "share": column.share,
        "over_kinds": column.over_kinds,
        "decimals": None if column.share or interval is None else decimals_for(interval),
    }


def _plain(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]
