"""Does a caption tell the images of its pair apart? Measured with CLIP on a sample of pairs.

DCPO (arXiv 2502.06023) names the problem *conflict*: with one prompt for both images, the preferred and the
less preferred one are about as close to it, so that training pulls and pushes along the same text. Captions
of their own are to put that right. The paper shows the overlap of two distributions of CLIP scores; we count:

    conflict = share of captions that are at least as close to the other image of their pair as to their own
               (ties count half)

which is 50 % by construction when both images share one caption, and 0 % when every caption fits its own
image best. The paper's view is kept beside it: how often the loser is at least as close to its text as the
winner to its own, with the prompt for both and with a caption each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffpref.captions.statistics import similarity_edges
from diffpref.evaluators import stats

BATCH = 16
EPSILON = 1e-6
"""Cosines that differ by no more are equal: they are float32."""

DIFFERENCES = ("own_minus_other", "gap_caption", "gap_prompt")
"""Measures that are differences of cosines; the others are shares."""

Floats = NDArray[np.float64]


class Encoder(Protocol):
    """What is asked of a CLIP model: rows of length 1 as float32 tensors [N, D]."""

    def embed_images(self, images: Sequence[Image.Image]) -> Any: ...

    def embed_texts(self, texts: Sequence[str]) -> Any: ...


@dataclass(frozen=True)
class Texts:
    """The texts of a pair; the prompt may be missing ("")."""

    prompt: str
    winner: str
    loser: str


@dataclass(frozen=True)
class Cosines:
    """CLIP similarity of texts to images, each [pairs]. NaN where a pair has no prompt."""

    winner_own: Floats
    winner_other: Floats
    loser_own: Floats
    loser_other: Floats
    prompt_winner: Floats
    prompt_loser: Floats


def measure(encoder: Encoder, pairs: Iterable[tuple[Texts, Image.Image, Image.Image]]) -> Cosines:
    """Similarities of all texts and images within each pair (texts, winner, loser), a batch at a time."""
    pairs = iter(pairs)
    parts = [np.zeros((0, len(fields(Cosines))))]
    while batch := list(itertools.islice(pairs, BATCH)):
        parts.append(_measure(encoder, batch))
    return Cosines(*np.concatenate(parts).T)


def _measure(encoder: Encoder, batch: Sequence[tuple[Texts, Image.Image, Image.Image]]) -> Floats:
    texts = [text for t, _, _ in batch for text in (t.winner, t.loser, t.prompt)]
    images = [image for _, winner, loser in batch for image in (winner, loser)]
    t = np.asarray(encoder.embed_texts(texts), dtype=np.float64).reshape(len(batch), 3, -1)
    x = np.asarray(encoder.embed_images(images), dtype=np.float64).reshape(len(batch), 2, -1)
    cosines = np.einsum("btd,bxd->btx", t, x)
    cosines[[not texts.prompt for texts, _, _ in batch], 2] = np.nan
    (winner, loser, prompt) = (cosines[:, i] for i in range(3))
    return np.stack(
        [winner[:, 0], winner[:, 1], loser[:, 1], loser[:, 0], prompt[:, 0], prompt[:, 1]], axis=1
    )


def at_least_as_close(wrong: Floats, right: Floats) -> Floats:
    """1 where `wrong` is above `right`, 0.5 where equal within EPSILON, 0 below."""
    return stats.outcome_scores(wrong - right, EPSILON)


def conflict(cosines: Cosines, units: Sequence[int]) -> dict[str, Any]:
    """The measures with 95 % intervals.

    Args:
        units: [pairs], a number for the prompt of each: pairs of one prompt are averaged, then prompts are
            resampled.

    Returns:
        conflict: of all captions, `winner` and `loser`: of each one's; own_minus_other: of cosines;
        overlap: loser at least as close to its text as the winner, by `caption` and, where every pair has
        one, by `prompt`; similarity: mean and histogram of every column, with common `edges`.
    """
    if not len(units):
        raise ValueError("no pairs")
    winner = at_least_as_close(cosines.winner_other, cosines.winner_own)
    loser = at_least_as_close(cosines.loser_other, cosines.loser_own)
    own = (cosines.winner_own + cosines.loser_own) / 2
    other = (cosines.winner_other + cosines.loser_other) / 2
    columns = {
        "conflict": (winner + loser) / 2, "winner": winner, "loser": loser, "own_minus_other": own - other,
        "overlap_caption": at_least_as_close(cosines.loser_own, cosines.winner_own),
        "gap_caption": cosines.winner_own - cosines.loser_own,
    }  # fmt: skip
    prompts = np.isfinite(cosines.prompt_winner).all()
    if prompts:
        columns["overlap_prompt"] = at_least_as_close(cosines.prompt_loser, cosines.prompt_winner)
        columns["gap_prompt"] = cosines.prompt_winner - cosines.prompt_loser
    _, averages = stats.average_by_prompt(np.stack(list(columns.values()), axis=1), list(units))
    intervals = stats.bootstrap_means(averages).tolist() if len(averages) > 1 else [None] * len(columns)
    found: dict[str, Any] = {}
    for name, values, ends in zip(columns, averages.T, intervals, strict=True):
        value = float(values.mean())
        if ends is not None and name not in DIFFERENCES:
            ends = list(stats.rate_interval(ends, value, len(values)))
        found[name] = {"value": value, "interval": ends}
    return {"units": len(averages), "pairs": len(units), **found, "similarity": _histograms(cosines)}


def _histograms(cosines: Cosines) -> dict[str, Any]:
    values = {field.name: getattr(cosines, field.name) for field in fields(cosines)}
    known = {name: column for name, column in values.items() if np.isfinite(column).all()}
    edges = similarity_edges(np.concatenate(list(known.values())))
    return {
        "edges": edges,
        **{
            name: {"mean": float(column.mean()), "counts": np.histogram(column, edges)[0].tolist()}
            for name, column in known.items()
        },
    }
