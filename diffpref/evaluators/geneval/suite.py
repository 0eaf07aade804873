"""Writes the suite of GenEval-style prompts: `python -m diffpref.evaluators.geneval.suite --out FOLDER`.

The prompts are dealt by a seed from COCO's classes, ten colours, numbers and relations; they are none of the
published list, whose tasks and numbers of prompts they have.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from diffpref.evaluators.geneval.grammar import Claim, Thing
from diffpref.evaluators.geneval.words import COLORS, KINDS, NAMES, RELATIONS
from diffpref.paths import atomic_write_text

NAME = "geneval-style"
SEED = 553
COUNTS = dict(zip(KINDS, (80, 99, 80, 94, 100, 100), strict=True))
"""Prompts of each task, as in the published list."""
_COLORED = tuple(name for name in NAMES if name not in ("person", "orange"))
"""Classes that are asked for in a colour: people are not, and "an orange orange" says nothing."""

Item = TypeVar("Item")


def claims(kind: str) -> list[Claim]:
    """The claims of a task, none twice; classes, colours, numbers and relations occur equally often."""
    rng = np.random.default_rng([SEED, KINDS.index(kind)])
    made = dict.fromkeys(islice(_endless(kind, rng), 10 * COUNTS[kind]))
    return list(made)[: COUNTS[kind]]


def _endless(kind: str, rng: np.random.Generator) -> Iterator[Claim]:
    colored = kind in ("colors", "color_attr")
    pool = _COLORED if colored else NAMES
    firsts, seconds = _dealt(pool, rng), _dealt(pool, rng)
    colors, others = _dealt(COLORS, rng), _dealt(COLORS, rng)
    numbers, relations = _dealt((2, 3, 4), rng), _dealt(RELATIONS, rng)
    while True:
        first = Thing(
            next(firsts),
            count=next(numbers) if kind == "counting" else 1,
            color=next(colors) if colored else None,
        )
        if kind in ("single_object", "counting", "colors"):
            yield Claim(kind, (first,))
            continue
        second = Thing(next(seconds), color=next(others) if colored else None)
        if first.name != second.name and (not colored or first.color != second.color):
            yield Claim(kind, (first, second), next(relations) if kind == "position" else None)


def _dealt(items: Sequence[Item], rng: np.random.Generator) -> Iterator[Item]:
    """All items in random order, again and again."""
    while True:
        yield from (items[index] for index in rng.permutation(len(items)))


def suite_text() -> str:
    """The suite as a TOML file, with the published sampler settings."""
    lines = [
        "# Written by `python -m diffpref.evaluators.geneval.suite`. These are not GenEval's own prompts.",
        f'name = "{NAME}"',
        'description = "553 GenEval-style prompts made from COCO\'s class list; not the published list"',
        'license = "Apache-2.0"',
        'scheduler = "ddim"',
        "steps = 50",
        "guidance = 9.0",
        "width = 512",
        "height = 512",
        "seeds = [0, 1, 2, 3]",
    ]
    for kind in KINDS:
        for claim in claims(kind):
            lines += ["", "[[prompts]]", f'text = "{claim}"', f'kind = "{kind}"']
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("eval/suites"), help="folder of suites")
    atomic_write_text(parser.parse_args().out / f"{NAME}.toml", suite_text())


if __name__ == "__main__":
    main()
