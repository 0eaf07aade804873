"""What the rows of `cuda_speed.py` need of a GPU's memory, by `diffpref estimate`: no GPU is asked.

    python bench/cuda_memory.py     # writes bench/cuda_memory.json, in ten minutes on one core

The usual order's rows have no figure: `estimate` knows diffpref's own training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from cuda_rows import BATCH, ROWS, Row
from published import config_of

from diffpref.estimate import GIB, estimate
from diffpref.families.architectures import ARCHITECTURES
from diffpref.training.micro_batch import HEADROOM

FILE = Path(__file__).with_suffix(".json")
NOT_SEEN = ("train.compile", "train.channels_last", "train.tf32")
"""What an estimate cannot tell apart."""


def needed(row: Row) -> float:
    """GiB at the peak of a step, for a row of diffpref's own training."""
    switches = {name: value for name, value in (row.switches or {}).items() if name not in NOT_SEEN}
    return _estimated(row.model, row.micro, tuple(sorted(switches.items())))


@cache
def _estimated(model: str, micro: int, switches: tuple[tuple[str, Any], ...]) -> float:
    sizes = {"train.batch_size": BATCH[model], "train.micro_batch": micro}
    side = ARCHITECTURES[model].resolution
    config = config_of(f"architecture:{model}", side, {**dict(switches), **sizes})
    return round(estimate(config).peak / GIB, 1)


def figures() -> dict[str, float]:
    """GiB by row's name, as they were written."""
    found: dict[str, float] = json.loads(FILE.read_text())
    return found


def too_large(row: Row, card: float, known: dict[str, float]) -> str:
    """Why a row is not tried on a card of as many GiB; "" where it is, as is one without a figure."""
    gib = known.get(row.name, 0.0)
    if gib <= HEADROOM * card:
        return ""
    return f"not run: needs {gib:g} GiB by estimate, the card has {card:.0f}"


def with_smaller(rows: Sequence[Row], card: float, known: dict[str, float]) -> list[Row]:
    """The rows, each that is too large followed by the same training with fewer pairs at once, as many as
    are known to fit, unless that is one of the rows."""
    found: list[Row] = []
    for row in rows:
        found.append(row)
        if too_large(row, card, known):
            smaller = (replace(row, micro=micro) for micro in range(row.micro - 1, 0, -1))
            fits = (one for one in smaller if one.name in known and not too_large(one, card, known))
            one = next(fits, None)
            if one is not None and one not in [*rows, *found]:
                found.append(one)
    return found


def main() -> int:
    found: dict[str, float] = {}
    for row in ROWS:
        if not row.usual:
            found[row.name] = needed(row)
            print(row.name, found[row.name], flush=True)
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
