"""Preference accuracy on labelled pairs: of an evaluator, and of a diffusion model's implicit reward."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.accuracy.pairs import LabelledPairs
from diffpref.accuracy.protocol import choose_threshold, preference, summarise
from diffpref.accuracy.scorers import Scored, Scorer
from diffpref.data.schema import PairFile
from diffpref.errors import UserError
from diffpref.paths import atomic_write_bytes, atomic_write_text
from diffpref.processes import Processes
from diffpref.scoring import name_missing


def measure(
    scorer: Scorer,
    pairs: LabelledPairs,
    out: Path,
    tie_pairs: LabelledPairs | None,
    tie_threshold: float,
    allow_missing: bool,
    processes: Processes,
) -> dict[str, Any]:
    """Score both images of each pair, write OUT (JSON) and beside it the scores as .parquet; return the JSON.

    tie_pairs: pairs that the threshold is chosen on; without them it is `tie_threshold`. Finished blocks
    wait in a hidden folder beside `out`, so a stopped measurement goes on. Only the main process writes and
    returns more than {}.

    Raises UserError: images or captions that are missing or damaged, unless that is allowed; out not
    writable, or its .parquet one of the files of pairs.
    """
    _spare_inputs(out, [*pairs.files, *(tie_pairs.files if tie_pairs else [])])
    folder = out.with_name(f".{out.stem}.blocks")
    try:
        held_out = scorer.score(tie_pairs, folder / "ties") if tie_pairs else None
        scored = scorer.score(pairs, folder / "pairs")
        if not processes.main:
            return {}
        assert scored is not None
        threshold = tie_threshold
        if tie_pairs is not None and held_out is not None:
            kept = _usable(tie_pairs, held_out, allow_missing)
            held_scores = held_out[0][kept]
            threshold = choose_threshold(tie_pairs.labels[kept], preference(held_scores, scorer.scale))
        kept = _usable(pairs, scored, allow_missing)
        scores, labels = scored[0][kept], pairs.labels[kept]
        prompts = [pairs.prompts[pair] for pair in kept]
        found = {
            **scorer.about,
            "files": [str(file.path) for file in pairs.files],
            **summarise(labels, scores, prompts, threshold, scorer.scale),
            "threshold_chosen_on": [str(file.path) for file in tie_pairs.files] if tie_pairs else None,
            "without_label": pairs.stats.unlabelled,
            "missing": {
                **{bad.source: bad.reason for bad in pairs.stats.first_bad},
                **{pairs.source(pair): reason for pair, reason in scored[1].items()},
            },
        }
        _write(out, found, pairs, scored[0])
        shutil.rmtree(folder, ignore_errors=True)
        return found
    except OSError as error:
        raise UserError(f"cannot write {out}", why=str(error.strerror or error)) from error


def _spare_inputs(out: Path, files: Sequence[PairFile]) -> None:
    scores = out.with_suffix(".parquet")
    if scores.resolve() in [file.path.resolve() for file in files]:
        raise UserError(
            f"--out {out} would overwrite the pairs in {scores}",
            why="the scores of each pair go to the .parquet of the same name",
            fix="give another --out",
        )


def _usable(pairs: LabelledPairs, scored: Scored, allow_missing: bool) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Numbers of the pairs with both scores. Raises UserError naming the others unless they are allowed."""
    scores, errors = scored
    lines = [f"{bad.source}: {bad.reason}" for bad in pairs.stats.first_bad]
    lines += [f"{pairs.source(pair)}: {reason}" for pair, reason in errors.items()]
    count = pairs.stats.bad + len(errors)
    kept = np.flatnonzero(np.isfinite(scores).all(axis=1))
    if count and (not allow_missing or not len(kept)):
        raise name_missing(lines, count, len(pairs) + pairs.stats.bad, "pairs", bool(len(kept)))
    return kept


def _write(out: Path, found: dict[str, Any], pairs: LabelledPairs, scores: np.ndarray[Any, Any]) -> None:
    nullable = pa.array(scores[:, 0], from_pandas=True), pa.array(scores[:, 1], from_pandas=True)
    table = pa.table(
        {
            "source": [pairs.source(pair) for pair in range(len(pairs))],
            "prompt": pairs.prompts,
            "label_0": pairs.labels,
            "score_0": nullable[0],
            "score_1": nullable[1],
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    atomic_write_bytes(out.with_suffix(".parquet"), buffer.getvalue())
    atomic_write_text(out, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def describe(found: dict[str, Any]) -> str:
    """The result in a few lines."""
    named = found.get("evaluator") or " against ".join(found["implicit_reward"].values())
    lines = [f"{named}: {found['pairs']} pairs of {found['prompts']} prompts, {found['ties']} ties"]
    for key, name in (("decided", "pairs with a preference"), ("with_ties", "all, ties predicted")):
        part = found[key]
        if part is None or (key == "with_ties" and not found["ties"]):
            continue
        low, high = part["wilson"]
        over_prompts = "no interval over 1 prompt"
        if part["interval"]:
            ends = " to ".join(f"{100 * end:.1f}" for end in part["interval"])
            over_prompts = f"95 %: {ends} over {part['prompts']} prompts"
        lines.append(
            f"  {name:<24} {100 * part['accuracy']:5.1f} %   {over_prompts}; Wilson {100 * low:.1f} to "
            f"{100 * high:.1f} over {part['pairs']} pairs"
        )
    if found["ties"]:
        chosen = "chosen on other pairs" if found["threshold_chosen_on"] else "given; --tie-pairs chooses one"
        lines.append(f"  tie threshold {found['tie_threshold']:g} ({chosen})")
    if found["missing"]:
        lines.append(f"  {len(found['missing'])} pairs left out: images or captions missing or damaged")
    return "\n".join(lines)
