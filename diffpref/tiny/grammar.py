"""The caption grammar: scenes to captions, and captions back to what they claim."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np

from diffpref.errors import UserError
from diffpref.tiny.scenes import COLORS, SHAPES, Scene, Thing, relation

NUMBERS = ("a", "two", "three", "four", "five", "six")
PREFIXES = (
    "",
    "a photo of ",
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "a painting of ",
    "a sketch of ",
    "an icon of ",
)
RELATIONS = ("left of", "right of", "above", "below")
NOTHING = "nothing"


@dataclass(frozen=True)
class Noun:
    """`count` things of one shape, of one colour when it is said."""

    count: int
    color: str | None
    shape: str


@dataclass(frozen=True)
class Claim:
    """What a prompt claims: its GenEval kind, its nouns, and the relation of the first to the second."""

    kind: str
    nouns: tuple[Noun, ...]
    relation: str | None = None

    @property
    def total(self) -> int:
        """Number of things the prompt asks for."""
        return sum(noun.count for noun in self.nouns)


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def noun_text(count: int, color: str | None, shape: str) -> str:
    words = [NUMBERS[count - 1] if count <= len(NUMBERS) else "many"]
    return " ".join([*words, *([color] if color else []), shape if count == 1 else plural(shape)])


def listing(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def describe(things: list[Thing] | tuple[Thing, ...]) -> str:
    """Everything a caption can say of these things: number, colours, shapes, and the relation of two."""
    if not things:
        return NOTHING
    looks = [(t.color, t.shape) for t in things]
    if len(set(looks)) == 1:
        return noun_text(len(things), *looks[0])
    if len(things) == 2:
        (color_a, a), (color_b, b) = looks
        return f"{noun_text(1, color_a, a)} {relation(*things)} {noun_text(1, color_b, b)}"
    return listing([noun_text(1, color, shape) for color, shape in looks])


def kind_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The caption of a scene that says what its kind asks for and no more."""
    things = scene.things
    first = things[0]
    if scene.kind == "single_object":
        text = noun_text(1, None, first.shape)
    elif scene.kind == "colors":
        text = noun_text(1, first.color, first.shape)
    elif scene.kind == "counting":
        text = noun_text(len(things), first.color if rng.random() < 0.5 else None, first.shape)
    elif scene.kind == "two_object":
        text = listing([noun_text(1, None, t.shape) for t in things])
    elif scene.kind == "position":
        a, b = (noun_text(1, None, t.shape) for t in things)
        text = f"{a} {relation(first, things[1])} {b}"
    else:
        text = listing([noun_text(1, t.color, t.shape) for t in things])
    return PREFIXES[rng.integers(len(PREFIXES))] + text


def is_held_out(prompt: str) -> bool:
    """Whether a prompt's text belongs to the fifth of all prompts that no training ever sees.

    A hash of the text decides, so the pretraining captions, the preference pairs and the suites agree
    without a list. Kinds with few contents (a single shape, one colour) share contents across the split
    under another wording; the texts themselves never repeat.
    """
    return hashlib.blake2b(prompt.encode(), digest_size=8).digest()[0] % 5 == 0


_SHAPE_OF = {form: shape for shape in SHAPES for form in (shape, plural(shape))}
_NOUN = re.compile(
    rf"(?P<count>{'|'.join(NUMBERS)}) (?:(?P<color>{'|'.join(COLORS)}) )?(?P<shape>{'|'.join(_SHAPE_OF)})"
)
_PREFIX = re.compile("|".join(re.escape(p) for p in PREFIXES if p))


def _noun(text: str, prompt: str) -> Noun:
    match = _NOUN.fullmatch(text.strip())
    count = NUMBERS.index(match["count"]) + 1 if match else 0
    if match is None or (count == 1) != (match["shape"] in SHAPES):
        raise UserError(
            f"the oracle cannot read the prompt {prompt!r}",
            f"{text.strip()!r} is not one of its phrases (number, colour, shape)",
            "use prompts of the tiny world's grammar, e.g. 'a red circle left of a blue square', "
            "or another evaluator",
        )
    return Noun(count, match["color"], _SHAPE_OF[match["shape"]])


def parse_prompt(prompt: str) -> Claim:
    """What `prompt` claims.

    Raises:
        UserError: the prompt is not in the grammar.
    """
    text = prompt.strip().lower().rstrip(".")
    prefix = _PREFIX.match(text)
    body = text[prefix.end() :] if prefix else text
    if body == NOTHING:
        return Claim("counting", ())
    for rel in RELATIONS:
        left, found, right = body.partition(f" {rel} ")
        if found:
            return Claim("position", (_noun(left, prompt), _noun(right, prompt)), rel)
    nouns = tuple(_noun(part, prompt) for part in re.split(r", | and ", body))
    if len(nouns) == 1:
        kind = "counting" if nouns[0].count > 1 else "colors" if nouns[0].color else "single_object"
    else:
        kind = "color_attr" if any(noun.color for noun in nouns) else "two_object"
    return Claim(kind, nouns)
