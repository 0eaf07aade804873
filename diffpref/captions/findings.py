"""The numbers of a captions report, from the pass over the rows, and what a reader should be told of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from diffpref.captions.statistics import bin_lengths, length_edges, length_summary, share
from diffpref.captions.survey import ROLES, SIMILARITY_BINS, UNDECIDED, UNKNOWN_LEVEL, Survey
from diffpref.captions.wording import MAX_WORDS, NEAR_DUPLICATE
from diffpref.reporting import formatting as show

MANY_CUT, MANY_UNCHANGED, MANY_ALIKE = 0.01, 0.05, 0.05
"""Shares above which the report says so at its top."""
DEFINITION = (
    "Similarity of two captions: 2 L / (n + m), with n and m their words in lower case without punctuation "
    f"(the first {MAX_WORDS:,} of each) and L the length of the longest sequence of words that both have in "
    "the same order. It is the share of words that the sample sheet leaves unmarked. Near-duplicates have "
    f"{NEAR_DUPLICATE} or more."
)


def findings(survey: Survey, limit: int, tokenizer: str) -> dict[str, Any]:
    """Counts and shares of everything that the pass saw. Shares of nothing are None."""
    captioned = survey.captioned
    return {
        "rows": survey.rows,
        "captioned": captioned,
        "missing": survey.missing,
        "decided": captioned - survey.undecided,
        "undecided": survey.undecided,
        "tokens": _tokens(survey, limit, tokenizer),
        "unchanged": _unchanged(survey),
        "equal": {"count": survey.equal, "share": share(survey.equal, captioned)},
        "near_duplicates": {
            "count": survey.near,
            "share": share(survey.near, captioned),
            "threshold": NEAR_DUPLICATE,
            "definition": DEFINITION,
            "edges": [bin_ / SIMILARITY_BINS for bin_ in range(SIMILARITY_BINS + 1)],
            "counts": list(survey.similarities),
        },
        "repeats": {
            role: survey.repeats[role].summary()
            for role in (*ROLES, UNDECIDED, "prompt")
            if role in survey.repeats
        },
    }


def _tokens(survey: Survey, limit: int, tokenizer: str) -> dict[str, Any] | None:
    """None where nobody counted."""
    if not survey.lengths:
        return None
    everything: Counter[int] = Counter()
    for lengths in survey.lengths.values():
        everything.update(lengths)
    edges = length_edges(everything, limit)
    captions: Counter[int] = Counter()
    for role, lengths in survey.lengths.items():
        captions.update(lengths if role != "prompt" else {})
    return {
        "limit": limit,
        "tokenizer": tokenizer,
        "edges": edges,
        "captions": length_summary(captions, limit),
        "roles": {
            role: {
                **length_summary(survey.lengths[role], limit),
                "counts": bin_lengths(survey.lengths[role], edges),
            }
            for role in (*ROLES, "prompt", UNDECIDED)
            if role in survey.lengths
        },
    }


def _unchanged(survey: Survey) -> dict[str, Any] | None:
    """By level and in all; None where no perturber is known to have taken part."""
    if not survey.perturbed:
        return None
    total, unchanged = survey.perturbed.total(), survey.unchanged.total()
    return {
        "perturbed": total,
        "unchanged": unchanged,
        "share": share(unchanged, total),
        "levels": {
            level: {
                "perturbed": survey.perturbed[level],
                "unchanged": survey.unchanged[level],
                "share": share(survey.unchanged[level], survey.perturbed[level]),
            }
            for level in sorted(survey.perturbed, key=_level_order)
        },
    }


def _level_order(level: str) -> tuple[int, str]:
    known = ("weak", "medium", "strong")
    return (known.index(level) if level in known else len(known) + (level == UNKNOWN_LEVEL), level)


def notes(report: dict[str, Any]) -> list[str]:
    """What a careful reader should know before training on these captions."""
    found = []
    if report["missing"]:
        found.append(f"{_rows(report['missing'])} without two captions: nothing below speaks of them.")
    if report["undecided"]:
        found.append(f"{_rows(report['undecided'])} without a preference: training leaves them out.")
    if not report["provenance"]:
        found.append(
            "The files do not say who wrote the captions: method, backends and the share that a perturber "
            "left unchanged are unknown."
        )
    tokens, unchanged = report["tokens"], report["unchanged"]
    if tokens is None:
        found.append("Nobody counted tokens: name the text encoder's tokenizer with --tokenizer.")
    elif tokens["captions"].get("cut_share", 0) > MANY_CUT:
        found.append(
            f"{show.number(tokens['captions']['cut_share'], True)} of the captions are longer than the "
            f"{tokens['limit']} tokens that the text encoder reads: it sees their beginning only."
        )
    if unchanged and unchanged["share"] > MANY_UNCHANGED:
        found.append(f"The perturber left {show.number(unchanged['share'], True)} of its captions unchanged.")
    alike = report["near_duplicates"]
    if alike["share"] and alike["share"] > MANY_ALIKE:
        found.append(
            f"In {show.number(alike['share'], True)} of the pairs both captions are the same or nearly so: "
            "there dual captions are hardly different from one shared prompt."
        )
    conflict = report["conflict"]
    # a perturbed caption is meant to fit its image badly, so for the other methods 50 % is no fault
    described = report["method"] in ("", "captioning")
    if described and conflict and (conflict["conflict"]["interval"] or [0, 0])[1] >= 0.5:
        found.append(
            "By this CLIP model the captions do not clearly tell the images of a pair apart: one shared "
            "prompt has a conflict of 50 %."
        )
    return found


def _rows(count: int) -> str:
    return f"{count:,} row is" if count == 1 else f"{count:,} rows are"
