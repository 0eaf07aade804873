"""Statistics of captions in memory that does not grow with their number; pure, one pass."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from diffpref.data.pairs import stable_hash

Item = TypeVar("Item")

HELD_TEXTS = 1 << 17
"""Distinct texts that Repeats holds at once; up to so many its counts are exact."""
_SHOWN = 200


class Smallest(Generic[Item]):
    """The `count` items of smallest key: with hashes as keys a fair sample that no order of rows changes."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[int, int, Item]] = []
        self._seen = 0

    def add(self, key: int, item: Item) -> None:
        self._seen += 1
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, (-key, self._seen, item))
        elif self._count and -key > self._heap[0][0]:
            heapq.heapreplace(self._heap, (-key, self._seen, item))

    def items(self) -> list[Item]:
        """From the smallest key up."""
        return [item for _, _, item in sorted(self._heap, reverse=True, key=lambda entry: entry[0])]


@dataclass
class Repeats:
    """How often texts come again.

    Adaptive sampling (P. Flajolet, Computing 43, 1990): texts are kept by hash, all of them until `held`
    distinct ones are there, then those of every second hash, every fourth and so on. What is kept is kept
    with all its occurrences, so shares are fair estimates, exact while `exact`.
    """

    held: int = HELD_TEXTS
    level: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    texts: dict[int, str] = field(default_factory=dict)

    def add(self, text: str) -> None:
        key = stable_hash(text)
        if key & ((1 << self.level) - 1):
            return
        self.counts[key] += 1
        if self.counts[key] == 2:
            self.texts[key] = text[:_SHOWN]
        while len(self.counts) > self.held:
            self.level += 1
            mask = (1 << self.level) - 1
            self.counts = Counter({key: n for key, n in self.counts.items() if not key & mask})
            self.texts = {key: text for key, text in self.texts.items() if not key & mask}

    def summary(self, most: int = 5) -> dict[str, Any]:
        """distinct: texts; repeated: occurrences of texts that occur more than once; share: of all."""
        total = self.counts.total()
        repeated = sum(self.counts[key] for key in self.texts)
        frequent = sorted(self.texts, key=lambda key: (-self.counts[key], self.texts[key]))[:most]
        return {
            "exact": self.level == 0,
            "distinct": len(self.counts) << self.level,
            "repeated": repeated << self.level,
            "share": repeated / total if total else 0.0,
            "most": [{"text": self.texts[key], "count": self.counts[key]} for key in frequent],
        }


def share(part: int, whole: int) -> float | None:
    """part / whole; None of nothing."""
    return part / whole if whole else None


def length_summary(lengths: Counter[int], limit: int) -> dict[str, Any]:
    """Mean, quantiles and the share above `limit` of whole numbers and how often each occurs.

    A quantile q is the smallest length that at least the share q of them do not exceed.
    """
    count = lengths.total()
    if not count:
        return {"count": 0}
    values = sorted(lengths)
    running = np.cumsum([lengths[value] for value in values])
    cut = sum(n for value, n in lengths.items() if value > limit)
    return {
        "count": count,
        "mean": sum(value * n for value, n in lengths.items()) / count,
        "median": values[int(np.searchsorted(running, 0.5 * count))],
        "p95": values[int(np.searchsorted(running, 0.95 * count))],
        "max": values[-1],
        "cut": cut,
        "cut_share": cut / count,
    }


def length_edges(lengths: Counter[int], limit: int, bins: int = 30) -> list[int]:
    """Edges of equal whole bins from 0 on that cover the limit and 99.5 % of the lengths.

    One of the edges is limit + 1, so that no bin holds lengths on both sides of the limit. Bin i is
    [edges[i], edges[i + 1]); longer ones are counted in the last.
    """
    values = sorted(lengths)
    running = np.cumsum([lengths[value] for value in values])
    high = max(values[int(np.searchsorted(running, 0.995 * running[-1]))], limit) if values else limit
    width = max(1, math.ceil((high + 1) / bins))
    first = (limit + 1) % width
    last = limit + 1 + width * math.ceil(max(0, high - limit) / width)
    return ([0] if first else []) + list(range(first, last + 1, width))


def bin_lengths(lengths: Counter[int], edges: Sequence[int]) -> list[int]:
    """How many lengths lie in each bin; those from the last edge up count in the last bin."""
    counts = [0] * (len(edges) - 1)
    for value, n in lengths.items():
        place = int(np.searchsorted(edges, value, side="right")) - 1
        counts[min(place, len(counts) - 1)] += n
    return counts


def unit_bin(value: float, bins: int = 20) -> int:
    """The bin of a value of 0..1 among equal ones, each with its lower edge; 1 belongs to the last."""
    return min(bins - 1, int(value * bins + 1e-9))


def similarity_edges(values: ArrayLike, bins: int = 24) -> list[float]:
    """Equal bins that cover all values, shared by the histograms that are to be compared."""
    array = np.asarray(values, dtype=np.float64)
    low, high = float(array.min()), float(array.max())
    return [float(edge) for edge in np.linspace(low, high if high > low else low + 1e-3, bins + 1)]
