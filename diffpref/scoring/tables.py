"""Tables of scores on disk: `scores.parquet`, and `scores.json` with what its columns mean."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.files import LARGEST_JSON, parse_json, read_text
from diffpref.image_tables import ImageRow
from diffpref.paths import atomic_write_bytes, atomic_write_text
from diffpref.scoring.judges import SAME_SCORES, Judge, owner

IDENTITY = ("id", "prompt_id", "prompt", "kind", "seed", "file", "image_sha256")
ERROR = "error"
"""Column that says why an image has no scores; it is there only when there is such an image."""
_KEYS = ("id", "prompt", "image_sha256")


@dataclass(frozen=True)
class Scores:
    """A table of scores with what scores.json says of its evaluators."""

    table: pa.Table
    about: dict[str, Any]

    def columns(self, evaluator: str) -> list[str]:
        return [name for name in self.table.column_names if owner(name, self.about) == evaluator]

    def slice(self, evaluator: str, identity: dict[str, Any], keys: pa.Table) -> pa.Table | None:
        """Keys, errors and scores of these images, or None unless the same evaluator scored all of them here,
        in this order."""
        about = self.about.get(evaluator)
        if about is None or {key: about.get(key) for key in SAME_SCORES} != identity:
            return None
        first = self.table["id"].index(keys["id"][0]).as_py()
        part = self.table.slice(first, len(keys)) if first >= 0 else None
        if part is None or not part.select(_KEYS).equals(keys):
            return None
        errors = part[ERROR] if ERROR in part.column_names else pa.nulls(len(part), pa.string())
        return _joined(keys.append_column(ERROR, errors), part.select(self.columns(evaluator)))


def _joined(left: pa.Table, right: pa.Table) -> pa.Table:
    for name in right.column_names:
        left = left.append_column(name, right[name])
    return left


def read_scores(parquet: Path, info: Path) -> Scores | None:
    """Earlier scores; None when there are none that can be used."""
    try:
        about = parse_json(read_text(info, LARGEST_JSON))["evaluators"]
        table = pq.read_table(parquet)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    known = isinstance(about, dict) and all(isinstance(entry, dict) for entry in about.values())
    return Scores(table, about) if known and set(_KEYS) <= set(table.column_names) else None


def identity_table(rows: Sequence[ImageRow], hashes: pa.ChunkedArray) -> pa.Table:
    return pa.table(
        {
            "id": [row.id for row in rows],
            "prompt_id": pa.array([row.prompt_id for row in rows], pa.int64()),
            "prompt": [row.prompt for row in rows],
            "kind": [row.kind for row in rows],
            "seed": pa.array([row.seed for row in rows], pa.int64()),
            "file": [row.file for row in rows],
            "image_sha256": hashes,
        }
    )


def with_other_evaluators(
    table: pa.Table, judges: Sequence[Judge], earlier: Scores | None
) -> tuple[pa.Table, dict[str, Any]]:
    """Keep scores of other evaluators if they were given to exactly these images and prompts."""
    about = {judge.name: judge.about for judge in judges}
    if earlier is None or not earlier.table.select(_KEYS).equals(table.select(_KEYS)):
        return table, about
    for evaluator, description in earlier.about.items():
        if evaluator not in about:
            about[evaluator] = description
            table = _joined(table, earlier.table.select(earlier.columns(evaluator)))
    return table, about


def missing_rows(table: pa.Table) -> list[dict[str, str]]:
    """Images without scores: id, file and reason."""
    columns = (table[name].to_pylist() for name in ("id", "file", ERROR))
    return [{"id": i, "file": f, "reason": e} for i, f, e in zip(*columns, strict=True) if e is not None]


def write_scores(parquet: Path, info: Path, table: pa.Table, about: dict[str, Any]) -> None:
    """Write both files, the table last: whoever finds it finds what its columns mean beside it."""
    missing = missing_rows(table)
    if not missing:
        table = table.drop_columns([ERROR])
    facts = {"images": len(table), "missing": missing, "evaluators": about}
    buffer = io.BytesIO()
    pq.write_table(table.combine_chunks(), buffer, compression="zstd")
    atomic_write_text(info, json.dumps(facts, indent=2) + "\n")
    atomic_write_bytes(parquet, buffer.getvalue())
