"""Histograms as inline SVG; colours come from the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from diffpref.reporting.scales import ticks

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 18, 34


@dataclass(frozen=True)
class Series:
    """Counts of the bins. style: "win" or "loss"; an outline is drawn over the bars of another series."""

    label: str
    counts: Sequence[int]
    style: str = "win"
    outline: bool = False


@dataclass(frozen=True)
class _Frame:
    """Where values (x) and shares (y) lie in the drawing."""

    low: float
    high: float
    top: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.low) / (self.high - self.low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.top * (HEIGHT - TOP - BOTTOM)


def histogram(
    title: str,
    unit: str,
    edges: Sequence[float],
    series: Sequence[Series],
    mark: tuple[float, str] | None = None,
    open_end: bool = False,
) -> Markup:
    """Bars as shares of each series; `mark` draws a line there, and bars that start from it on are coloured.

    edges: ascending, one more than counts. unit: what stands under the axis. open_end: the last bin holds all
    that is longer too.
    """
    shares = [[count / max(1, sum(one.counts)) for count in one.counts] for one in series]
    heights = ticks(0.0, 100 * max((value for values in shares for value in values), default=0.0), 3)
    frame = _Frame(edges[0], edges[-1], heights[-1] / 100)
    parts = _axes(frame, heights, unit, open_end)
    for one, values in zip(series, shares, strict=True):
        if one.outline:
            parts.append(_outline(frame, edges, values, one.style))
        else:
            parts += _bars(frame, edges, values, one.style, mark)
    parts += _mark(frame, *mark) if mark else []
    said = "; ".join(f"{one.label}: {_said(one.counts, edges)}" for one in series)
    return Markup(  # every part is made of numbers and of names escaped here
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: {escape(said)}">'
        + "".join(parts)
        + "</svg>"
    )


def _axes(frame: _Frame, heights: Sequence[float], unit: str, open_end: bool) -> list[str]:
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{frame.y(t / 100):.1f}" '
        f'y2="{frame.y(t / 100):.1f}"/><text class="tick" x="{LEFT - 5}" y="{frame.y(t / 100) + 3.5:.1f}" '
        f'text-anchor="end">{t:g} %</text>'
        for t in heights
    ]
    parts += [
        f'<text class="tick middle" x="{frame.x(t):.1f}" y="{HEIGHT - BOTTOM + 14}">{round(t, 6):g}</text>'
        for t in ticks(frame.low, frame.high)
        if frame.low <= t <= frame.high and not (open_end and frame.x(frame.high) - frame.x(t) < 48)
    ]
    if open_end:
        place = f'x="{WIDTH - RIGHT}" y="{HEIGHT - BOTTOM + 14}" text-anchor="end"'
        parts.append(f'<text class="tick" {place}>≥ {frame.high:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text class="tick middle" x="{middle}" y="{HEIGHT - 4}">{escape(unit)}</text>']


def _bars(
    frame: _Frame,
    edges: Sequence[float],
    values: Sequence[float],
    style: str,
    mark: tuple[float, str] | None,
) -> list[str]:
    parts = []
    for left, right, value in zip(edges, edges[1:], values, strict=False):
        if value:
            beyond = mark is not None and left >= mark[0]
            x, width = frame.x(left) + 0.5, max(0.5, frame.x(right) - frame.x(left) - 1)
            height = max(0.8, frame.y(0) - frame.y(value))
            parts.append(
                f'<rect class="{"beyond" if beyond else style}" x="{x:.1f}" y="{frame.y(0) - height:.1f}" '
                f'width="{width:.1f}" height="{height:.1f}"/>'
            )
    return parts


def _outline(frame: _Frame, edges: Sequence[float], values: Sequence[float], style: str) -> str:
    corners = [(edges[0], 0.0)]
    for left, right, value in zip(edges, edges[1:], values, strict=False):
        corners += [(left, value), (right, value)]
    points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in [*corners, (edges[-1], 0.0)])
    return f'<polyline class="outline {style}" points="{points}"/>'


def _mark(frame: _Frame, value: float, label: str) -> list[str]:
    at = frame.x(value)
    anchor, shift = ("end", -4) if at > WIDTH / 2 else ("start", 4)
    place = f'x="{at + shift:.1f}" y="{TOP - 5}" text-anchor="{anchor}"'
    return [
        f'<line class="level" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 12}" y2="{HEIGHT - BOTTOM}"/>',
        f'<text class="tick" {place}>{escape(label)}</text>',
    ]


def _said(counts: Sequence[int], edges: Sequence[float]) -> str:
    most = max(range(len(counts)), key=lambda i: counts[i])
    return f"{sum(counts)} in all, most from {edges[most]:.3g} to {edges[most + 1]:.3g}"
