"""Numbers as a reader wants them: shares in percent, differences with a sign, intervals in brackets."""

from __future__ import annotations

import math
from collections.abc import Sequence

MINUS = "\u2212"
DASH = "\u2013"
NO_INTERVAL = "no interval"  # of a single prompt


def number(value: float, share: bool = False, decimals: int | None = None) -> str:
    """``0.5824`` as ``58.2 %`` when it is a share; else with ``decimals``, or to four digits without."""
    return f"{_text(value, share, decimals)} %" if share else _text(value, share, decimals)


def interval(ends: Sequence[float] | None, share: bool = False, decimals: int | None = None) -> str:
    """Both ends, without the unit: ``56.1\u201360.2``; ends with a sign are kept apart by "to"."""
    if ends is None:
        return NO_INTERVAL
    low, high = (_text(end, share, decimals) for end in ends)
    return f"{low}{DASH}{high}" if min(ends) >= 0 else f"{low} to {high}"


def change(value: float, share: bool = False, decimals: int | None = None) -> str:
    """A difference with its sign; of shares in percentage points."""
    text = _text(value, share, decimals)
    return text if text.startswith(MINUS) else f"+{text}"


def change_interval(ends: Sequence[float] | None, share: bool = False, decimals: int | None = None) -> str:
    """Both ends of a difference with their signs: ``+3.1 to +6.8``."""
    if ends is None:
        return NO_INTERVAL
    return " to ".join(change(end, share, decimals) for end in ends)


def decimals_for(ends: Sequence[float]) -> int | None:
    """Decimals that write half the width of an interval with two digits; None for an interval of no width."""
    half = (ends[1] - ends[0]) / 2
    return min(6, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else None


def p_value(p: float) -> str:
    """``0.032``, or ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _text(value: float, share: bool, decimals: int | None) -> str:
    if share:
        return _signed(100 * value, 1)
    return _digits(value) if decimals is None else _signed(value, decimals)


def _digits(value: float) -> str:
    text = f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"
    return text.replace("-", MINUS)


def _signed(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)
