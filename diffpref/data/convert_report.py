"""What a conversion did, as numbers (report.json) and as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from diffpref.data.pairs import stable_hash
from diffpref.data.parts import Tally, read_tally
from diffpref.data.report_text import aligned, named_rows, share
from diffpref.data.sources.base import HARMLESS, REASONS, TIE

_SIZES_SHOWN = 8
_LABELS = {"1": "image_0_preferred", "0": "image_1_preferred", "0.5": "ties"}


def build_report(parts: Sequence[Path]) -> dict[str, Any]:
    """The counts of all parts, every reason included. read = kept + the sum of dropped; rows count pairs.

    bad: rows whose data are at fault, the first of which stand in bad_rows, with those that
    have no label or identical images. resolutions: images of kept pairs.
    """
    tally = Tally()
    for part in parts:
        tally.merge(read_tally(part))
    return {
        "rows": tally.read,
        "kept": tally.kept,
        "dropped": {reason: tally.dropped[reason] for reason in REASONS},
        "bad": sum(count for reason, count in tally.dropped.items() if reason not in HARMLESS),
        "labels": {name: tally.labels[label] for label, name in _LABELS.items()},
        "distinct_prompts": _distinct_captions(parts),
        "resolutions": dict(sorted(tally.sizes.items(), key=lambda item: (-item[1], item[0]))),
        "bad_rows": [
            {"row": row, "reason": reason, "detail": detail} for row, reason, detail in tally.bad
        ],
        "parts": len(parts),
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report as lines of text, the rows that were named last."""
    rows, kept = report["rows"], report["kept"]
    lines = [("rows read", f"{rows:,}"), ("kept", share(kept, rows))]
    lines += [
        (f"dropped, {REASONS[reason]}", share(count, rows))
        for reason, count in report["dropped"].items()
        if count
    ]
    decided = kept - report["labels"]["ties"]
    lines.append(("image 0 preferred", share(report["labels"]["image_0_preferred"], decided)))
    if report["labels"]["ties"]:
        lines.append(("ties, kept", share(report["labels"]["ties"], kept)))
    lines.append(("distinct prompts", f"{report['distinct_prompts']:,}"))
    sizes = list(report["resolutions"].items())
    images = 2 * kept
    lines += [(f"images of {size}", share(count, images)) for size, count in sizes[:_SIZES_SHOWN]]
    other = sum(count for _, count in sizes[_SIZES_SHOWN:])
    if other:
        lines.append((f"images of {len(sizes) - _SIZES_SHOWN} other sizes", share(other, images)))
    bad = [(row["row"], row["detail"]) for row in report["bad_rows"]]
    unnamed = rows - kept - report["dropped"][TIE] - len(bad)
    return "\n".join(aligned(lines) + named_rows("dropped rows, but ties:", bad, unnamed))


def _distinct_captions(parts: Sequence[Path]) -> int:
    """Counted by 8-byte hashes: a billion prompts would fit in memory, their texts would not."""
    seen: np.ndarray[Any, np.dtype[np.uint64]] = np.zeros(0, np.uint64)
    for part in parts:
        captions = pq.read_table(part, columns=["caption"], memory_map=True).column("caption").to_pylist()
        seen = np.union1d(seen, np.array([stable_hash(caption) for caption in captions], np.uint64))
    return len(seen)
