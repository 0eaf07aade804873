"""How scores are spread over prompts: histograms as numbers and as inline SVG."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup, escape

from diffpref.reporting.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from diffpref.reporting.scales import tick_label, ticks

BINS = 20
SERIES = 6
"""Models that have a colour of their own in a drawing; the seventh shares that of the second."""


def histograms(scores: dict[str, np.ndarray], gains: dict[str, np.ndarray]) -> dict[str, Any]:
    """Counts of prompts.

    Args:
        scores: [P] by model, mean over the seeds of a prompt.
        gains: [P] by candidate, against the baseline and positive where the candidate is better.

    Returns:
        ``scores``: common bins of all models. ``gains``: common bins of all candidates, an odd number of
        them, the middle one around 0. Each with ``edges`` [B + 1] and ``counts`` [B] by name, and
        ``quartiles`` (of scores) or ``median`` (of gains) by name.
    """
    pooled = np.concatenate(list(scores.values()))
    low, high = float(pooled.min()), float(pooled.max())
    edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    reach = max((float(np.abs(gain).max()) for gain in gains.values()), default=0.0) or 1.0
    around = np.linspace(-reach, reach, BINS + 2)
    return {
        "scores": {
            "edges": edges.tolist(),
            "counts": {name: np.histogram(values, edges)[0].tolist() for name, values in scores.items()},
            "quartiles": {
                name: np.quantile(values, [0.25, 0.5, 0.75]).tolist() for name, values in scores.items()
            },
        },
        "gains": {
            "edges": around.tolist(),
            "counts": {name: np.histogram(gain, around)[0].tolist() for name, gain in gains.items()},
            "median": {name: float(np.median(gain)) for name, gain in gains.items()},
        },
    }


def series_style(position: int) -> str:
    """Class that colours the model at this position; 0 is the baseline."""
    return f"series-{position if position < SERIES else 1 + (position - 1) % (SERIES - 1)}"


def score_histogram(title: str, about: dict[str, Any], names: list[str]) -> Markup:
    """Outlines of all models over one another, the baseline (the first name) filled."""
    edges, counts = about["edges"], about["counts"]
    frame = _Frame(edges[0], edges[-1], max(max(counts[name]) for name in names))
    parts = [frame.axes("score")]
    for position, name in enumerate(names):
        points = [(edges[0], 0.0)]
        for left, right, count in zip(edges, edges[1:], counts[name], strict=False):
            points += [(left, count), (right, count)]
        points.append((edges[-1], 0.0))
        line = " ".join(f"{frame.x(value):.1f},{frame.y(count):.1f}" for value, count in points)
        filled = " filled" if position == 0 else ""
        parts.append(f'<polyline class="outline {series_style(position)}{filled}" points="{line}"/>')
    said = "; ".join(
        f"{name}: middle half from {about['quartiles'][name][0]:.4g} to {about['quartiles'][name][2]:.4g}, "
        f"median {about['quartiles'][name][1]:.4g}"
        for name in names
    )
    return _drawing(f"{title}, scores of the prompts. {said}", parts)


def gain_histogram(title: str, about: dict[str, Any], name: str) -> Markup:
    """Bars of one candidate's change by prompt: gains right of 0, losses left, the bin around 0 grey."""
    edges, counts = about["edges"], about["counts"][name]
    frame = _Frame(edges[0], edges[-1], max(max(values) for values in about["counts"].values()))
    parts = [frame.axes("change (right: better)")]
    middle = len(counts) // 2
    for index, count in enumerate(counts):
        if count:
            style = "tie" if index == middle else "win" if index > middle else "loss"
            x, y = frame.x(edges[index]), frame.y(count)
            width = max(1.0, frame.x(edges[index + 1]) - x - 1)
            parts.append(
                f'<rect class="bin {style}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{frame.y(0) - y:.1f}"/>'
            )
    parts.append(
        f'<line class="level" x1="{frame.x(0):.1f}" x2="{frame.x(0):.1f}" y1="{TOP}" y2="{frame.y(0)}"/>'
    )
    above, below = sum(counts[middle + 1 :]), sum(counts[:middle])
    said = f"{above} prompts gain, {below} lose, {counts[middle]} change little"
    median = f"median {about['median'][name]:.3g}"
    return _drawing(f"{title}, change of {name} by prompt. {said}; {median}", parts)


class _Frame:
    """Scales of a drawing: values to the right, counts of prompts up from 0."""

    def __init__(self, low: float, high: float, count: int) -> None:
        self.low, self.high, self.top = low, high, ticks(0, max(count, 1), 3)[-1]

    def x(self, value: float) -> float:
        return LEFT + (value - self.low) / (self.high - self.low) * (WIDTH - LEFT - RIGHT)

    def y(self, count: float) -> float:
        return HEIGHT - BOTTOM - count / self.top * (HEIGHT - TOP - BOTTOM)

    def axes(self, label: str) -> str:
        lines = [
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(t):.1f}" y2="{self.y(t):.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{self.y(t) + 3.5:.1f}" text-anchor="end">'
            f"{tick_label(t)}</text>"
            for t in ticks(0, self.top, 3)
        ]
        lines += [
            f'<text class="tick middle" x="{self.x(t):.1f}" y="{HEIGHT - BOTTOM + 15}">{tick_label(t)}</text>'
            for t in ticks(self.low, self.high)
            if self.low <= t <= self.high
        ]
        middle = (LEFT + WIDTH - RIGHT) / 2
        return "".join(lines) + f'<text class="tick middle" x="{middle}" y="{HEIGHT - 4}">{label}</text>'


def _drawing(label: str, parts: list[str]) -> Markup:
    # every part is made of numbers and of words of this module
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
