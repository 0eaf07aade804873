"""The settings that several captioners and perturbers share, and their checks."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from diffpref.captions.base import LEVELS
from diffpref.captions.templates import Template
from diffpref.config.schema import option
from diffpref.config.values import ValueProblem, check, spec_of
from diffpref.errors import UserError

MAX_TOKENS = 60
"""Fits the 77 tokens that CLIP reads, with room for a model that counts badly."""

LONGEST = 4000
"""Characters of a prompt or caption that models are asked about; the longest written by people have 2000."""


def level_option() -> Any:
    return option("medium", choices=LEVELS, help="how far the caption is changed")


def seed_option() -> Any:
    return option(0, bounds="[0, inf)", help="seed of the sampling; every row has a stream of its own")


def revision_option() -> Any:
    return option("", help="branch, tag or commit of a hub id; empty: the hub's default")


def max_tokens_option() -> Any:
    return option(
        MAX_TOKENS,
        bounds="[1, inf)",
        help="length asked for in the instruction, in tokens of the text encoder that will read the caption",
    )


def instruction_option() -> Any:
    return option(
        "",
        help="file with the instruction ({caption}, {level}); {level} in its name picks a file for each "
        "level; empty: those that ship with diffpref",
    )


def device_option() -> Any:
    return option("auto", help="where the model runs: cuda, cuda:1, cpu, ...; auto: a GPU where there is one")


def dtype_option() -> Any:
    return option(
        "auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="precision of the weights; auto: bf16 on a GPU that has it, else fp32",
    )


def batch_size_option() -> Any:
    return option(8, bounds="[1, inf)", help="rows of one forward pass; less needs less memory")


def top_p_option(default: float) -> Any:
    return option(
        default,
        bounds="(0, 1]",
        help="draw from the likeliest tokens that together have this probability; 1: from all",
    )


def temperature_option(default: float) -> Any:
    return option(default, bounds="[0, inf)", help="of the sampling; 0: always the likeliest token")


def new_tokens_option(default: int) -> Any:
    return option(
        default,
        bounds="[1, inf)",
        help="tokens of the model after which an answer is cut, at the end of a sentence where it has one",
    )


def require_valid(settings: Any, name: str) -> None:
    """Raise UserError naming the first field of the dataclass `settings` that does not fit its option.

    name: what the settings are of, such as "captioner".
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        try:
            check(value, spec_of(field, hints[field.name]))
        except ValueProblem as problem:
            raise UserError(
                f"{name}.{field.name} = {value!r} is not possible", why=str(problem), fix=problem.hint
            ) from None


def require_sampling(temperature: float, top_p: float, name: str) -> None:
    """Raise UserError where top_p would have no effect."""
    if temperature == 0 and top_p != 1:
        raise UserError(
            f"{name}.top_p = {top_p} has no effect",
            why=f"{name}.temperature is 0: the likeliest token is always taken",
            fix=f"leave out top_p, or set {name}.temperature",
        )


def require_asked(max_tokens: int, template: Template) -> None:
    """Raise UserError where max_tokens would have no effect."""
    if max_tokens != MAX_TOKENS and "tokens" not in template.names:
        raise UserError(
            f"captioner.max_tokens = {max_tokens} has no effect",
            why=f"the instruction does not ask for a length: {template.text[:80]!r}",
            fix="give a captioner.template with {tokens} in it",
        )


def too_long(text: str) -> str:
    """Why no model is asked about a text of this length, or "": one such row would stop or stall them all."""
    return f"it has {len(text)} characters, {LONGEST} are the most" if len(text) > LONGEST else ""


def has_words(caption: str) -> bool:
    """Whether there is anything to see in a caption."""
    return any(sign.isprintable() and not sign.isspace() for sign in caption)
