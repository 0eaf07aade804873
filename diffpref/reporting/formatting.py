"""Numbers as a reader wants them: shares in percent, differences with a sign, intervals in brackets."""

from __future__ import annotations

from collections.abc import Sequence

MINUS = "\u2212"
DASH = "\u2013"


def number(value: float, share: bool = False) -> str:
    """``0.5824`` as ``58.2 %`` when it is a share, else to four digits."""
    return f"{_signed(100 * value, 1)} %" if share else _digits(value)


def interval(ends: Sequence[float], share: bool = False) -> str:
    """Both ends, without the unit: ``56.1\u201360.2``; ends with a sign are kept apart by "to"."""
    low, high = (_signed(100 * end, 1) if share else _digits(end) for end in ends)
    return f"{low}{DASH}{high}" if min(ends) >= 0 else f"{low} to {high}"


def change(value: float, share: bool = False) -> str:
    """A difference with its sign; of shares in percentage points."""
    text = _signed(100 * value, 1) if share else _digits(value)
    return text if text.startswith(MINUS) else f"+{text}"


def change_interval(ends: Sequence[float], share: bool = False) -> str:
    """Both ends of a difference with their signs: ``+3.1 to +6.8``."""
    return " to ".join(change(end, share) for end in ends)


def p_value(p: float) -> str:
    """``0.032``, or ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _digits(value: float) -> str:
    text = f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"
    return text.replace("-", MINUS)


def _signed(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)
