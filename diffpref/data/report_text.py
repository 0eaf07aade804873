"""Reports of counts as lines of text: what the commands that go through pairs print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diffpref.texts import one_line


def share(part: int, whole: int) -> str:
    """`12 (34.0%)`; the count alone where the whole is nothing."""
    return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"


def aligned(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in lines)
    return [f"{name:<{width}}  {value}" for name, value in lines]


def named_rows(title: str, rows: Iterable[tuple[str, str]], unnamed: int) -> list[str]:
    """A block of rows with what is wrong with each, and how many more there are; nothing for none."""
    named = [f"  {one_line(row)}: {one_line(detail)}" for row, detail in rows]
    return ["", title, *named, *([f"  and {unnamed:,} more"] if unnamed > 0 else [])] if named else []
