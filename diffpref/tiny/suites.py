"""Writes the suites of the small world: `python -m diffpref.tiny.suites --out eval/suites`."""

from __future__ import annotations

import argparse
from itertools import islice, product
from pathlib import Path

import numpy as np

from diffpref.paths import atomic_write_text
from diffpref.tiny.grammar import PREFIXES, is_held_out, listing, noun_text
from diffpref.tiny.scenes import COLORS, KINDS, SHAPES

SEED = 97
STEPS, GUIDANCE = 16, 3.5
FULL = dict(zip(KINDS, (5, 26, 94, 36, 60, 379), strict=True))
"""Prompts of each kind in the full suite: kinds with few distinct prompts have fewer."""
DEMO = dict(zip(KINDS, (5, 20, 30, 25, 30, 50), strict=True))
TUNE = dict(zip(KINDS, (5, 15, 30, 20, 35, 95), strict=True))
"""Prompts for choosing recipes: never held-out ones, so that no choice looks at what results are told on."""


def _contents(kind: str) -> list[str]:
    """Every prompt body of a kind."""
    nouns = [noun_text(1, None, shape) for shape in SHAPES]
    colored = [noun_text(1, color, shape) for color in COLORS for shape in SHAPES]
    pairs = [(a, b) for a, b in product(colored, colored) if a.split()[1] != b.split()[1]]
    if kind == "single_object":
        return nouns
    if kind == "colors":
        return colored
    if kind == "counting":
        return [noun_text(n, color, shape) for n in (2, 3) for color in (None, *COLORS) for shape in SHAPES]
    if kind == "two_object":
        return [listing([a, b]) for a, b in product(nouns, nouns) if a != b]
    if kind == "position":
        relations = ("left of", "right of", "above", "below")
        plain = [f"{a} {r} {b}" for a, r, b in product(nouns, relations, nouns) if a != b]
        return plain + [f"{a} {r} {b}" for (a, b), r in product(pairs, relations)][::11]
    return [listing(list(pair)) for pair in pairs]


def suite_prompts(kind: str, held_out: bool = True) -> list[str]:
    """All held-out prompts of a kind (or all others), shuffled by a fixed seed."""
    prompts = [p + body for body in _contents(kind) for p in PREFIXES if is_held_out(p + body) == held_out]
    order = np.random.default_rng([SEED, KINDS.index(kind)]).permutation(len(prompts))
    return [prompts[k] for k in order]


def _suite(name: str, description: str, counts: dict[str, int], held_out: bool = True) -> str:
    lines = [
        f'name = "{name}"',
        f'description = "{description}"',
        'license = "Apache-2.0"',
        'scheduler = "ddim"',
        f"steps = {STEPS}",
        f"guidance = {GUIDANCE}",
        "width = 64",
        "height = 64",
        "seeds = [0]",
    ]
    for kind, count in counts.items():
        for prompt in islice(suite_prompts(kind, held_out), count):
            lines += ["", "[[prompts]]", f'text = "{prompt}"', f'kind = "{kind}"']
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m diffpref.tiny.suites", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the suites")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    described = "held-out prompts of the small world, GenEval's six kinds"
    atomic_write_text(out / "tiny.toml", _suite("tiny", f"{sum(FULL.values())} {described}", FULL))
    atomic_write_text(out / "tiny-demo.toml", _suite("tiny-demo", f"{sum(DEMO.values())} {described}", DEMO))
    tune = f"{sum(TUNE.values())} prompts that training may have seen, for choosing recipes"
    atomic_write_text(out / "tiny-tune.toml", _suite("tiny-tune", tune, TUNE, held_out=False))


if __name__ == "__main__":
    main()
