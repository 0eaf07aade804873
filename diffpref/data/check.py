"""`diffpref check`: look through preference pairs, images included, before time is spent on training.

What it does with a cache stands in cache_check.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from diffpref.data.pairs import PairTable, open_pairs, stable_hash
from diffpref.data.report_text import aligned, named_rows, share
from diffpref.data.scan import TableStats
from diffpref.data.schema import Captions, Columns
from diffpref.errors import UserError

_HASHES_AT_ONCE = 65536
_SIZES_SHOWN = 8


@dataclass(frozen=True)
class CheckReport:
    """What a set of pairs holds. `kept` pairs can be trained on; images of ties are not decoded.

    decided: pairs with a preference and captions, good images or not; first_wins of them prefer image 0.
    prompts: distinct captions. sizes: (width, height) -> images of kept pairs. caption_lengths: characters ->
    captions, one a pair when shared, two when dual.
    """

    files: tuple[Path, ...]
    captions: Captions
    stats: TableStats
    decided: int
    prompts: int
    sizes: Counter[tuple[int, int]]
    caption_lengths: Counter[int]

    @property
    def kept(self) -> int:
        return self.stats.kept

    def table(self) -> str:
        """The report as lines of text, bad rows last."""
        stats = self.stats
        rows: list[tuple[str, str]] = [
            ("files", str(len(self.files))),
            ("rows", f"{stats.rows:,}"),
            ("kept", share(stats.kept, stats.rows)),
            ("ties, dropped", share(stats.ties, stats.rows)),
            ("without a label, dropped", share(stats.unlabelled, stats.rows)),
            ("identical images, dropped", share(stats.identical, stats.rows)),
            ("bad", share(stats.bad, stats.rows)),
            ("image 0 preferred", share(stats.first_wins, self.decided)),
            ("distinct captions" if self.captions == "dual" else "distinct prompts", f"{self.prompts:,}"),
            ("characters a caption", _quantiles(self.caption_lengths)),
        ]
        common = self.sizes.most_common(_SIZES_SHOWN)
        rows += [(f"images of {w} x {h}", share(n, self.sizes.total())) for (w, h), n in common]
        other = self.sizes.total() - sum(n for _, n in common)
        if other:
            rows.append(
                (f"images of {len(self.sizes) - len(common)} other sizes", share(other, self.sizes.total()))
            )
        bad_share = f"{stats.bad / stats.rows:.2%}"
        title = f"bad rows ({bad_share}; training stops above data.max_bad_share, 1 % by default):"
        bad = [(row.source, row.reason) for row in stats.first_bad]
        return "\n".join(aligned(rows) + named_rows(title, bad, stats.bad - len(bad)))


def check(
    pairs: str | Path,
    columns: Columns | None = None,
    captions: Captions = "shared",
    out: TextIO | None = None,
) -> CheckReport:
    """Read every pair, decode every image, and print what was found (to `out`, by default standard output).

    Raises UserError, as `open_pairs` does, for data that training would refuse; bad rows, however many, are
    listed instead, unless no usable pair is left.
    """
    table = open_pairs(pairs, columns, captions, max_bad_share=1.0, option="--columns.{} {}")
    sizes: Counter[tuple[int, int]] = Counter()
    for index in tqdm(range(len(table)), desc="images", unit="pair", file=sys.stderr, disable=None):
        pair = table.try_load(index)
        if pair is not None:
            sizes.update((pair.winner_image.size, pair.loser_image.size))
    prompts, lengths = _captions(table, captions)
    report = CheckReport(table.files, captions, table.stats, len(table), prompts, sizes, lengths)
    print(report.table(), file=out or sys.stdout)
    if report.kept == 0:
        raise UserError(
            f"no usable pair in {pairs}", why=table.stats.summary(), fix="see the rows named above"
        )
    return report


def _captions(table: PairTable, captions: Captions) -> tuple[int, Counter[int]]:
    """(distinct captions, characters -> captions). Distinct ones are counted by hashes, 8 bytes each."""
    lengths: Counter[int] = Counter()
    seen: np.ndarray[Any, np.dtype[np.uint64]] = np.zeros(0, np.uint64)
    hashes: list[int] = []
    for both in table.iter_captions():
        for caption in both if captions == "dual" else both[:1]:
            lengths[len(caption)] += 1
            hashes.append(stable_hash(caption))
        if len(hashes) >= _HASHES_AT_ONCE:
            seen, hashes = np.union1d(seen, np.array(hashes, np.uint64)), []
    return len(np.union1d(seen, np.array(hashes, np.uint64))), lengths


def _quantiles(lengths: Counter[int]) -> str:
    values = sorted(lengths)
    running = np.cumsum([lengths[value] for value in values])
    median = values[int(np.searchsorted(running, running[-1] / 2))]
    return f"{values[0]} to {values[-1]}, median {median}"


def is_cache(path: Path) -> bool:
    """Whether a folder is a cache, of one or several sets of pairs, or a part of one."""
    return path.is_dir() and any(True for _ in find_parts(path))


def find_parts(folder: Path) -> Iterator[Path]:
    """The folders of latents and text at `folder`, in it and in its folders."""
    for place in (folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))):
        if place.resolve().name in ("latents", "text-shared", "text-dual"):
            begun = (place / "manifest.json").exists() and not any(place.glob("*.parquet"))
            if begun or any(place.glob("*.safetensors")):
                yield place
