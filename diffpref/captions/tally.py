"""What became of the rows of a part, or of all parts, in numbers that add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffpref.captions.source import Slice
from diffpref.data.parts import NAMED_BAD_ROWS, read_footer


@dataclass
class CaptionTally:
    """read = kept + all of `dropped`.

    dropped: rows left out, by reason. sources: captions of kept rows by where they come from. perturbed,
    unchanged: captions that went through a perturber, and those of them that it returned as they were.
    undecided: kept rows without a preference. tokens: captions by their tokens. bad: (row, reason, detail) of
    the first rows left out.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    perturbed: int = 0
    unchanged: int = 0
    undecided: int = 0
    tokens: Counter[int] = field(default_factory=Counter)
    bad: list[list[str]] = field(default_factory=list)

    def add(self, piece: Slice, made: pa.RecordBatch, kept: pa.Table, lost: Sequence[int | None]) -> None:
        """Count a slice: what was made of its rows, the rows kept of it, and who lost in each row."""
        reasons = made.column("reason").to_pylist()
        details = made.column("detail").to_pylist()
        self.read += made.num_rows
        self.kept += kept.num_rows
        for offset, (reason, detail) in enumerate(zip(reasons, details, strict=True)):
            if reason:
                self.dropped[reason] += 1
                if len(self.bad) < NAMED_BAD_ROWS:
                    text = " ".join(detail.encode("utf-8", "backslashreplace").decode().split())
                    self.bad.append([piece.where(offset), reason, text])
        self.undecided += sum(
            loser is None and not reason for loser, reason in zip(lost, reasons, strict=True)
        )
        for side in (0, 1):
            self.sources.update(kept.column(f"origin_{side}").combine_chunks().field("source").to_pylist())
            tokens = kept.column(f"tokens_{side}").to_pylist()
            self.tokens.update(count for count in tokens if count is not None)
        changed = [
            flag
            for flag, reason in zip(made.column("changed").to_pylist(), reasons, strict=True)
            if flag is not None and not reason
        ]
        self.perturbed += len(changed)
        self.unchanged += changed.count(False)

    def merge(self, other: CaptionTally) -> None:
        """Add the counts of the part that follows."""
        for name in ("read", "kept", "perturbed", "unchanged", "undecided"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("dropped", "sources", "tokens"):
            getattr(self, name).update(getattr(other, name))
        self.bad += other.bad[: NAMED_BAD_ROWS - len(self.bad)]

    def to_json(self) -> dict[str, Any]:
        counters = {
            name: {str(key): count for key, count in sorted(getattr(self, name).items())}
            for name in ("dropped", "sources", "tokens")
        }
        numbers = {name: getattr(self, name) for name in ("read", "kept", "perturbed", "unchanged")}
        return {**numbers, "undecided": self.undecided, **counters, "bad": self.bad}

    @staticmethod
    def from_json(found: dict[str, Any]) -> CaptionTally:
        tokens = Counter({int(count): captions for count, captions in found["tokens"].items()})
        counters = {"dropped": Counter(found["dropped"]), "sources": Counter(found["sources"])}
        return CaptionTally(**{**found, **counters, "tokens": tokens})


def read_tally(path: Path) -> CaptionTally:
    """The tally of a finished part. Raises UserError when the file is not one of ours or damaged."""
    return read_footer(path, CaptionTally.from_json, "caption")
