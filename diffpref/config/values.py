"""One value: from TOML or from command line text to the type, range and choices that a field asks for."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass
from typing import Any, Literal, Union, get_args, get_origin

from diffpref.errors import nearest
from diffpref.files import parse_toml

NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of texts",
}


class ValueProblem(Exception):
    """The value does not fit; the message says what would, `hint` what was probably meant."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Spec:
    """What a key accepts."""

    kind: type  # str, int, float, bool or tuple (of str)
    default: Any  # MISSING: the key is required
    bounds: str = ""
    choices: tuple[Any, ...] = ()
    multiple_of: int = 1
    help: str = ""
    word: str = ""  # a text that stands in for a number

    @property
    def allowed(self) -> str:
        """In words: "a number from 0 to below 1"."""
        if self.choices:
            return "one of " + ", ".join(map(quote, self.choices))
        text = NAMES[self.kind]
        if self.bounds:
            text += f" {in_words(self.bounds)}"
        if self.multiple_of > 1:
            text += f", a multiple of {self.multiple_of}"
        return f"{text}, or {quote(self.word)}" if self.word else text


def spec_of(field: Field[Any], hint: Any) -> Spec:
    """The Spec of a dataclass field whose annotation evaluates to `hint`."""
    metadata: Mapping[str, Any] = field.metadata
    choices = tuple(metadata.get("choices", ()))
    if get_origin(hint) in (Union, types.UnionType):
        # X | None: TOML has no null, so None is "left out"; X | str: the word that may stand in for X
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is Literal:
        choices = choices or get_args(hint)
        hint = type(choices[0])
    kind = get_origin(hint) or hint
    if kind not in NAMES:
        raise TypeError(f"field {field.name}: no configuration type for {hint!r}")
    default = field.default
    if default is MISSING and field.default_factory is not MISSING:
        default = field.default_factory()
    return Spec(
        kind,
        default,
        metadata.get("bounds", ""),
        choices,
        metadata.get("multiple_of", 1),
        metadata.get("help", ""),
        metadata.get("word", ""),
    )


def check(value: Any, spec: Spec) -> Any:
    """`value` as the type that `spec` asks for; raises ValueProblem when it does not fit."""
    if spec.word and value == spec.word:
        return value
    value = _as_kind(value, spec)
    if spec.choices and value not in spec.choices:
        close = nearest(str(value), map(str, spec.choices))
        raise ValueProblem(f"allowed: {spec.allowed}", f"did you mean {close!r}?" if close else "")
    if spec.bounds and not inside(value, spec.bounds):
        raise ValueProblem(f"allowed: {spec.allowed}")
    if spec.multiple_of > 1 and value % spec.multiple_of:
        low = value // spec.multiple_of * spec.multiple_of
        raise ValueProblem(f"allowed: {spec.allowed}", f"the nearest are {low} and {low + spec.multiple_of}")
    return value


def _as_kind(value: Any, spec: Spec) -> Any:
    if spec.kind is tuple and isinstance(value, list | tuple):
        return tuple(_text(item) for item in value)
    if spec.kind is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise ValueProblem(f"allowed: {spec.allowed}; it must be finite")
        return float(value)
    if spec.kind is str and isinstance(value, str):
        return _text(value)
    if type(value) is spec.kind:
        return value
    raise ValueProblem(f"allowed: {spec.allowed}; this is {_type_name(value)}", _type_hint(value, spec))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueProblem(f"allowed: a list of texts; {quote(value)} in it is {_type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueProblem("it holds bytes that are not UTF-8 text") from None
    if "\0" in value:
        raise ValueProblem("it holds a null character")
    return value


def _type_name(value: Any) -> str:
    names = {
        bool: "true or false",
        dict: "a table",
        list: "a list",
        str: "text",
        int: "a whole number",
        float: "a fraction",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _type_hint(value: Any, spec: Spec) -> str:
    if isinstance(value, str):
        try:
            return f"write {quote(from_text(value, spec))} without quotes"
        except ValueProblem:
            return ""
    if spec.kind is str and not isinstance(value, dict | list):
        return f'write "{value}" with quotes'
    if spec.kind is int and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return ""


def from_text(text: str, spec: Spec) -> Any:
    """The value that command line text means for this key; text needs no quotes, a list is a TOML array."""
    value: Any = text
    if spec.word and text.strip() == spec.word:
        return spec.word
    try:
        if spec.kind is bool:
            value = {"true": True, "false": False}[text.strip().lower()]
        elif spec.kind is int:
            value = int(text)
        elif spec.kind is float:
            value = float(text)
        elif spec.kind is tuple or (text[:1] in ("'", '"') and len(text) > 1 and text[-1] == text[0]):
            value = _toml_value(text)
    except (ValueError, KeyError):
        hint = """write it as '["first", "second"]'""" if spec.kind is tuple else ""
        raise ValueProblem(f"allowed: {spec.allowed}", hint) from None
    return check(value, spec)


def _toml_value(text: str) -> Any:
    table = parse_toml(f"value = {text}")
    if set(table) != {"value"}:
        raise ValueError("more than one value")
    return table["value"]


def inside(value: float, bounds: str) -> bool:
    """Whether `value` lies in an interval written like "[0, 1)"."""
    low, high = (float(end) for end in bounds[1:-1].split(","))
    above = value >= low if bounds[0] == "[" else value > low
    below = value <= high if bounds[-1] == "]" else value < high
    return above and below


def in_words(bounds: str) -> str:
    """An interval such as "[0, 1)" in words: "from 0 to below 1"."""
    low, high = (end.strip() for end in bounds[1:-1].split(","))
    start = ("from " if high != "inf" else "at least ") + low if bounds[0] == "[" else f"above {low}"
    end = f"to {high}" if bounds[0] == "[" and bounds[-1] == "]" else f"at most {high}"
    if bounds[-1] == ")":
        end = f"to below {high}" if bounds[0] == "[" else f"below {high}"
    return start if high == "inf" else f"{start}{' ' if bounds[0] == '[' else ', '}{end}"


def quote(value: Any) -> str:
    """A value as one would write it in TOML (texts in double quotes, booleans small)."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(quote, value)) + "]"
    return repr(value)
