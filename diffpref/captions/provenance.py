"""How a folder of captions was made, read from what is stored in it."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.captions.survey import Survey
from diffpref.data.parts import NAMED_BAD_ROWS, TALLY
from diffpref.data.schema import PairFile
from diffpref.files import parse_json, read_text

SETTINGS = "settings.json"
_METHODS = {"captioner": "captioning", "perturber": "perturbation", "captioner+perturber": "hybrid"}


def provenance(survey: Survey) -> list[dict[str, Any]]:
    """Who wrote the captions of winners, losers and pairs without a preference, and how many; most first."""
    return [
        {
            "role": role,
            "source": source,
            "captioner": dict(captioner),
            "perturber": dict(perturber),
            "captions": n,
        }
        for (role, source, captioner, perturber), n in survey.sources.most_common()
    ]


def method(sources: Sequence[dict[str, Any]]) -> str:
    """The method of DCPO that most losers' captions come from; "" where their sources are not stored."""
    losers = (entry for entry in sources if entry["role"] == "loser")
    return next((_METHODS[entry["source"]] for entry in losers if entry["source"] in _METHODS), "")


def stored_settings(files: Sequence[PairFile]) -> dict[str, Any]:
    """settings.json beside the parts; {} without one that can be read."""
    try:
        found = parse_json(read_text(files[0].path.parent / SETTINGS))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def left_out(files: Sequence[PairFile]) -> dict[str, Any] | None:
    """Rows that did not get into the parts, from their footers; None where the files have none.

    reasons: rows by reason. rows: (row, reason, detail) of the first of them.
    """
    reasons: Counter[str] = Counter()
    rows: list[list[str]] = []
    read, told = 0, False
    for file in files:
        tally = _tally(file.path)
        if tally is not None:
            told = True
            read += tally["read"]
            reasons.update(tally["dropped"])
            rows += tally["bad"][: NAMED_BAD_ROWS - len(rows)]
    if not told:
        return None
    return {"read": read, "count": reasons.total(), "reasons": dict(reasons.most_common()), "rows": rows}


def _tally(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((pq.read_metadata(path).metadata or {})[TALLY])
        return {
            "read": int(found["read"]),
            "dropped": {str(reason): int(count) for reason, count in found["dropped"].items()},
            "bad": [[str(text) for text in entry] for entry in found["bad"]],
        }
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def caption_command(sources: Sequence[dict[str, Any]], found: dict[str, Any], folder: Path) -> str:
    """The `diffpref caption` command that makes captions like these; "" where their sources are unknown.

    found: the stored settings, which are taken where they are there. An instruction of one's own is known by
    its hash only and stands in no command.
    """
    name = method(sources)
    if not name:
        return ""
    parts = ["diffpref", "caption", "--pairs", str(found.get("pairs") or "PAIRS"), "--method", name]
    for kind in ("captioner", "perturber"):
        maker: dict[str, Any] = next((entry[kind] for entry in sources if entry[kind]), {})
        if maker:
            stored = {key: value for key, value in found.items() if key.startswith(f"{kind}.")}
            settings = stored or {f"{kind}.{key}": maker.get(key) for key in ("model", "level", "seed")}
            if settings.get(f"{kind}.model"):
                settings[f"{kind}.revision"] = maker.get("revision")
            else:
                settings.pop(f"{kind}.revision", None)  # of our own rules: no option
            settings.pop(f"{kind}.template", None)
            parts += [f"--{kind}", str(maker.get("backend"))]
            parts += [text for key, value in settings.items() if value for text in (f"--{key}", str(value))]
    parts += ["--tokenizer", str(found["tokenizer"])] if found.get("tokenizer") else []
    parts += ["--limit", str(found["limit"])] if found.get("limit") else []
    parts += ["--replace"] if found.get("replace") else []
    return shlex.join([*parts, "--out", str(folder)])
