"""Line charts of a training run as inline SVG; colours come from the page's style sheet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from diffpref.reporting.loading import TrainingRun
from diffpref.reporting.scales import ticks

WIDTH, HEIGHT = 280, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 32
MAX_POINTS = 300


@dataclass(frozen=True)
class Line:
    """One curve. ``style`` is the class that colours it."""

    label: str
    steps: list[int]
    values: list[float]
    style: str


@dataclass(frozen=True)
class Chart:
    """A titled drawing with one sentence on how to read it."""

    title: str
    meaning: str
    svg: Markup
    legend: list[tuple[str, str]]


_CHARTS = (
    (
        "Loss",
        "What the objective minimises; comparable only between runs of one objective.",
        None,
        ("loss", "validation.loss"),
    ),
    (
        "Implicit accuracy",
        "Share of pairs in which the model moved towards the winner more than towards the loser; "
        "50 % is chance.",
        0.5,
        ("implicit_accuracy", "validation.implicit_accuracy"),
    ),
    (
        "Margin",
        "How much more the winner's error fell than the loser's, against the reference.",
        0.0,
        ("margin", "validation.margin"),
    ),
    (
        "Gains",
        "Error of the reference minus the model's own, for winners and losers apart: above 0 the model fits "
        "them better than before. "
        "A winner below 0 while the margin grows is likelihood displacement.",
        0.0,
        ("winner_gain", "loser_gain"),
    ),
)


def _label_of(key: str) -> str:
    names = {"winner_gain": "winner", "loser_gain": "loser"}
    return "held-out pairs" if key.startswith("validation.") else names.get(key, "training pairs")


def _style_of(key: str) -> str:
    """Second curves of a chart are orange and dashed."""
    return "loss" if key == "loser_gain" or key.startswith("validation.") else "win"


def training_charts(run: TrainingRun) -> list[Chart]:
    """The curves that this run logged; a reference-free objective has no margin or gains."""
    charts = []
    for title, meaning, level, keys in _CHARTS:
        lines = [Line(_label_of(key), *run.series[key], _style_of(key)) for key in keys if key in run.series]
        if lines:
            legend = [(line.style, line.label) for line in lines] if len(lines) > 1 else []
            charts.append(Chart(title, meaning, line_chart(title, lines, level), legend))
    return charts


def line_chart(title: str, lines: list[Line], level: float | None = None) -> Markup:
    """Thin raw values under a thick moving average; ``level`` draws a dashed line to compare with."""
    lines = [_thinned(line) for line in lines]
    steps = [step for line in lines for step in line.steps]
    values = [value for line in lines for value in line.values] + ([level] if level is not None else [])
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1)
    y_ticks = ticks(min(values), max(values))
    y_low, y_high = min(y_ticks[0], *values), max(y_ticks[-1], *values)

    def x(step: float) -> float:
        return LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y(t) + 3.5:.1f}" text-anchor="end">{_label(t)}</text>'
        for t in y_ticks
    ]
    parts += [
        f'<text class="tick middle" x="{x(t):.1f}" y="{HEIGHT - BOTTOM + 15}">{_label(t)}</text>'
        for t in ticks(x_low, x_high)
        if x_low <= t <= x_high
    ]
    parts.append(f'<text class="tick middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 2}">step</text>')
    if level is not None:
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>'
        )
    for line in lines:
        for kind, series in (("raw", line.values), ("smooth", _smooth(line.values))):
            points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(line.steps, series, strict=True))
            parts.append(f'<polyline class="{kind} {line.style}" points="{points}"/>')
    said = "; ".join(f"{line.label} from {line.values[0]:.4g} to {line.values[-1]:.4g}" for line in lines)
    return Markup(  # every part is made of numbers and of names escaped here
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: {escape(said)}">'
        + "".join(parts)
        + "</svg>"
    )


def _thinned(line: Line) -> Line:
    every = math.ceil(len(line.steps) / MAX_POINTS)
    if every == 1:
        return line
    groups = range(0, len(line.steps), every)
    return Line(
        line.label,
        [line.steps[i] for i in groups],
        [float(np.mean(line.values[i : i + every])) for i in groups],
        line.style,
    )


def _smooth(values: list[float]) -> list[float]:
    """Mean over a centred window of a tenth of the run."""
    half = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return [float(v) for v in (sums[high] - sums[low]) / (high - low)]


def _label(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{round(value, 10):g}"
