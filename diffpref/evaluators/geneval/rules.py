"""GenEval's rules: which detections count, and whether they are what a prompt claims.

Source: D. Ghosh, H. Hajishirzi and L. Schmidt, *GenEval: An Object-Focused Framework for Evaluating
Text-to-Image Alignment* (NeurIPS 2023), section 3, and the published evaluation with its default options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffpref.evaluators.geneval.grammar import Claim, Thing
from diffpref.evaluators.geneval.words import plural

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
"""Of one class; the most confident ones. Overlapping ones are all kept, as by the published default."""
POSITION_OFFSET = 0.1
"""Centres must be further apart than this share of both objects' sizes together."""
_DIRECTION = 0.5  # of the unit vector between the centres, so that two relations can hold: left of and above


@dataclass(frozen=True)
class Detection:
    """An object in an image. box: left, top, right, bottom in pixels; score in 0..1; mask bool [H, W]."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Verdict:
    """Whether all of a claim holds, and what does not."""

    correct: bool
    reasons: tuple[str, ...]


Found = Mapping[str, Sequence[Detection]]
"""Detections that count, by class, the most confident first."""


def kept(detections: Sequence[Detection], claim: Claim) -> dict[str, list[Detection]]:
    """Those above the threshold of the claim's task, the most confident first (equal ones as detected)."""
    threshold = COUNTING_THRESHOLD if claim.kind == "counting" else THRESHOLD
    by_name: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold and len(by_name.setdefault(detection.name, [])) < MAX_OBJECTS:
            by_name[detection.name].append(detection)
    return {name: found for name, found in by_name.items() if found}


def to_colour(claim: Claim, found: Found) -> list[Detection]:
    """The detections whose colour the verdict needs: the most confident one of each thing with a colour."""
    return [found[thing.name][0] for thing in claim.things if thing.color and found.get(thing.name)]


def judge(claim: Claim, found: Found, colors: Mapping[str, str]) -> Verdict:
    """Whether what was found is what the claim says.

    Numbers are exact when counting; elsewhere one of a class is enough, and colour and position are those
    of its most confident detection.

    Args:
        colors: by class, the colour of its most confident detection, for the things that `to_colour` asks.
    """
    reasons = [reason for thing in claim.things if (reason := _missing(thing, claim, found, colors))]
    if claim.relation and not reasons:
        first, second = (found[thing.name][0] for thing in claim.things)
        true = relations(first.box, second.box)
        if claim.relation not in true:
            names = f"{first.name} is not {claim.relation} {second.name}"
            reasons.append(f"{names}: it is {' and '.join(sorted(true)) or 'too close to tell'}")
    return Verdict(not reasons, tuple(reasons))


def _missing(thing: Thing, claim: Claim, found: Found, colors: Mapping[str, str]) -> str:
    count = len(found.get(thing.name, ()))
    wrong_number = count != thing.count if claim.kind == "counting" else count < thing.count
    if wrong_number:
        wanted = plural(thing.name) if thing.count > 1 else thing.name
        return f"{count} of {thing.count} {wanted}" if count else f"no {thing.name}"
    if thing.color and colors[thing.name] != thing.color:
        return f"{thing.name} is {colors[thing.name]}, not {thing.color}"
    return ""


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box `a` is relative to box `b`: none, one, or two of the four relations.

    Per axis the distance of the centres is shortened by 0.1 of both extents together; what is left, over the
    full distance of the centres, must be above one half.
    """
    corners = np.array([a, b], dtype=np.float64).reshape(2, 2, 2)
    centres, extents = corners.mean(axis=1), corners[:, 1] - corners[:, 0]
    offset = centres[0] - centres[1]
    beyond = np.maximum(np.abs(offset) - POSITION_OFFSET * extents.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    held = {
        "left of": x < -_DIRECTION,
        "right of": x > _DIRECTION,
        "above": y < -_DIRECTION,
        "below": y > _DIRECTION,
    }
    return {name for name, holds in held.items() if holds}
