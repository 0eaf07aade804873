"""Prompts of GenEval's six tasks: sentences to what they claim."""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffpref.errors import UserError
from diffpref.evaluators.geneval.words import (
    COLORS,
    NAMES,
    NUMBERS,
    RELATIONS,
    plural,
    plural_forms,
    with_article,
)


@dataclass(frozen=True)
class Thing:
    """`count` objects of a class, of a colour when it is said."""

    name: str
    count: int = 1
    color: str | None = None

    def __str__(self) -> str:
        words = f"{self.color} {self.name}" if self.color else self.name
        return with_article(words) if self.count == 1 else f"{NUMBERS[self.count - 2]} {plural(self.name)}"


@dataclass(frozen=True)
class Claim:
    """What a prompt asks for: its task, its things, and where the first is relative to the second."""

    kind: str
    things: tuple[Thing, ...]
    relation: str | None = None

    def __str__(self) -> str:
        first, *others = map(str, self.things)
        joined = f" {self.relation} " if self.relation else " and "
        return "a photo of " + joined.join([first, *others])


_NAME_OF = {form: name for name in NAMES for form in plural_forms(name)}
_ONE = re.compile(rf"an? (?:({'|'.join(COLORS)}) )?({'|'.join(NAMES)})")
_SEVERAL = re.compile(rf"({'|'.join(NUMBERS)}) ({'|'.join(_NAME_OF)})")
_JOINED = re.compile(rf"(.+?) (and|{'|'.join(RELATIONS)}) (.+)")


def parse_prompt(prompt: str) -> Claim:
    """What `prompt` claims. Case, spaces, "a photo of" and a full stop do not matter.

    Raises:
        UserError: it is none of the six tasks; the message says what could not be read.
    """
    text = " ".join(prompt.lower().split()).removesuffix(".").removeprefix("a photo of ")
    several = _SEVERAL.fullmatch(text)
    if several:
        return Claim("counting", (Thing(_NAME_OF[several[2]], NUMBERS.index(several[1]) + 2),))
    joined = _JOINED.fullmatch(text)
    if joined is None:
        thing = _one(text, prompt)
        return Claim("colors" if thing.color else "single_object", (thing,))
    things = _one(joined[1], prompt), _one(joined[3], prompt)
    colored = sum(thing.color is not None for thing in things)
    relation = None if joined[2] == "and" else joined[2]
    if things[0].name == things[1].name:
        raise _unreadable(prompt, "its two objects are of one class, which no task of GenEval has")
    if relation and colored:
        raise _unreadable(prompt, "no task of GenEval has both a colour and a position")
    if colored == 1:
        raise _unreadable(prompt, "one of its objects has a colour and the other has none")
    return Claim("position" if relation else "color_attr" if colored else "two_object", things, relation)


def _one(text: str, prompt: str) -> Thing:
    match = _ONE.fullmatch(text)
    if match is None:
        raise _unreadable(
            prompt, f"{text!r} is not 'a' and one of COCO's 80 classes, with or without one of ten colours"
        )
    return Thing(match[2], color=match[1])


def _unreadable(prompt: str, why: str) -> UserError:
    return UserError(
        f"geneval cannot read the prompt {prompt!r}",
        why=why,
        fix="geneval needs GenEval-style prompts, such as 'a photo of two dogs' or 'a photo of a red car and "
        "a white bench' (the suite geneval-style has 553); score other prompts with another evaluator",
    )
