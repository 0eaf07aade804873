"""What a caption run did, as numbers (report.json) and as lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffpref.captions.stages import REASONS
from diffpref.captions.tally import CaptionTally, read_tally
from diffpref.data.report_text import aligned, named_rows, share


def build_report(parts: Sequence[Path], limit: int) -> dict[str, Any]:
    """The counts of all parts. rows = kept + failed, failed is the sum of dropped; captions are two a row.

    limit: tokens that the text encoder reads, 0 where none were counted.
    """
    tally = CaptionTally()
    for part in parts:
        tally.merge(read_tally(part))
    return {
        "rows": tally.read,
        "kept": tally.kept,
        "failed": tally.dropped.total(),
        "dropped": {reason: tally.dropped[reason] for reason in REASONS},
        "captions": dict(sorted(tally.sources.items())),
        "perturbed": tally.perturbed,
        "unchanged": tally.unchanged,
        "without_preference": tally.undecided,
        "tokens": _tokens(tally.tokens, limit) if limit and tally.tokens else None,
        "bad_rows": [
            {"row": row, "reason": reason, "detail": detail} for row, reason, detail in tally.bad
        ],
        "parts": len(parts),
    }  # fmt: skip


def _tokens(counts: Counter[int], limit: int) -> dict[str, Any]:
    lengths = sorted(counts)
    running = np.cumsum([counts[length] for length in lengths])
    cut = sum(captions for length, captions in counts.items() if length > limit)
    return {
        "min": lengths[0],
        "median": lengths[int(np.searchsorted(running, running[-1] / 2))],
        "max": lengths[-1],
        "limit": limit,
        "cut": cut,
    }


def table(report: dict[str, Any]) -> str:
    """The report as lines of text, the rows that were named last."""
    rows, kept = report["rows"], report["kept"]
    lines = [("rows read", f"{rows:,}"), ("captioned", share(kept, rows))]
    lines += [
        (f"left out, {REASONS[reason]}", share(count, rows))
        for reason, count in report["dropped"].items()
        if count
    ]
    lines += [
        (f"captions of source {name}", share(count, 2 * kept)) for name, count in report["captions"].items()
    ]
    if report["perturbed"]:
        lines.append(("unchanged by the perturber", share(report["unchanged"], report["perturbed"])))
    if report["without_preference"]:
        lines.append(("without a preference", share(report["without_preference"], kept)))
    tokens = report["tokens"]
    if tokens:
        lines.append(("tokens", f"{tokens['min']} to {tokens['max']}, median {tokens['median']}"))
        lines.append((f"cut at {tokens['limit']} tokens", share(tokens["cut"], 2 * kept)))
    else:
        lines.append(("tokens", "not counted: name the text encoder's model with --tokenizer"))
    if "run" in report:
        lines.append(("captions/s of this run", f"{report['run']['captions_per_second']:,.2f}"))
    bad = [(row["row"], row["detail"]) for row in report["bad_rows"]]
    return "\n".join(aligned(lines) + named_rows("rows left out:", bad, report["failed"] - len(bad)))
