"""Preference accuracy from the scores of both images of each pair, with and without ties.

The protocol with ties is that of PickScore (Y. Kirstain et al., *Pick-a-Pic*, arXiv 2305.01569, and
trainer/scripts/eval_preference_predictor.py of its release): the scores of a pair become probabilities by a
softmax; a tie is predicted when they differ by the threshold or less; a pair gives 1 point when prediction
and label agree, 1/2 when exactly one of them is a tie, 0 otherwise. The threshold is the best of 0, 0.1,
..., 1 on other, held-out pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpref.evaluators import stats

Floats = NDArray[np.float64]
THRESHOLDS: tuple[float, ...] = tuple(step / 10 for step in range(11))


def preference(scores: Floats, scale: float = 1.0) -> Floats:
    """[pairs]: p_0 - p_1 in [-1, 1] of the softmax of scale * scores; scores [pairs, 2], higher is better."""
    return np.tanh(scale * (scores[:, 0] - scores[:, 1]) / 2)


def points(labels: Floats, preferences: Floats, threshold: float) -> Floats:
    """[pairs]: 1, 1/2 or 0. labels: 1 image 0, 0 image 1, 1/2 tie."""
    predicted = np.where(np.abs(preferences) <= threshold, 0.5, (preferences > 0).astype(np.float64))
    return 1.0 - np.abs(predicted - labels)  # 1/2 apart when exactly one of them is a tie


def choose_threshold(labels: Floats, preferences: Floats) -> float:
    """The first of THRESHOLDS with the most points."""
    return THRESHOLDS[
        int(np.argmax([points(labels, preferences, threshold).mean() for threshold in THRESHOLDS]))
    ]


def summarise(
    labels: Floats, scores: Floats, prompts: Sequence[str], threshold: float, scale: float = 1.0
) -> dict[str, Any]:
    """Accuracies with their intervals: `decided` over pairs with a preference, equal scores counting 1/2;
    `with_ties` over all pairs by the protocol."""
    margins = scores[:, 0] - scores[:, 1]
    preferences = preference(scores, scale)
    _, groups = np.unique(prompts, return_inverse=True)
    decided = labels != 0.5
    right = points(labels, np.sign(margins), 0.0)
    return {
        "pairs": len(labels),
        "prompts": int(groups.max()) + 1,
        "ties": int((~decided).sum()),
        "equal_scores": int((margins == 0).sum()),
        "decided": _accuracy(right[decided], groups[decided]) if decided.any() else None,
        "with_ties": _accuracy(points(labels, preferences, threshold), groups),
        "tie_threshold": threshold,
        "scale": scale,
        "with_ties_by_threshold": {
            f"{t:g}": float(points(labels, preferences, t).mean()) for t in THRESHOLDS
        },
    }


def _accuracy(right: Floats, groups: NDArray[np.int64]) -> dict[str, Any]:
    """Mean over pairs. `wilson` takes pairs as independent, `interval` prompts with all their pairs."""
    used, inverse = np.unique(groups, return_inverse=True)
    totals: Floats = np.bincount(inverse, right).astype(np.float64)
    counts: Floats = np.bincount(inverse).astype(np.float64)
    accuracy = float(right.mean())
    return {
        "accuracy": accuracy,
        "pairs": len(right),
        "prompts": len(used),
        "wilson": list(stats.wilson_interval(accuracy, len(right))),
        "interval": _interval(totals, counts, accuracy),
    }


def _interval(totals: Floats, counts: Floats, accuracy: float) -> list[float] | None:
    """Prompts resampled with their pairs, never narrower than Wilson's over prompts; None of one prompt."""
    if len(totals) < 2:
        return None
    return list(stats.rate_interval(stats.bootstrap_ratios(totals, counts), accuracy, len(totals)))
