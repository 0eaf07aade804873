"""Instructions to models: text files with placeholders, shipped or the user's own."""

from __future__ import annotations

import hashlib
import logging
import string
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from diffpref.errors import UserError, nearest
from diffpref.files import read_text, reason_of
from diffpref.paths import PACKAGE, resolve_existing

log = logging.getLogger("diffpref")
SHIPPED = PACKAGE / "captions" / "templates"


@dataclass(frozen=True)
class Template:
    """An instruction. names: the placeholders in it."""

    text: str
    names: frozenset[str]

    @property
    def digest(self) -> str:
        """The first 16 hex digits of the SHA-256 of its text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def fill(self, **values: object) -> str:
        """The text with the values of its placeholders; braces in the values stay as they are."""
        return self.text.format(**values)


def shipped_template(name: str, allowed: Collection[str]) -> Template:
    """The template that ships with diffpref as templates/NAME.txt."""
    return _read(SHIPPED / f"{name}.txt", allowed, ())


def read_template(
    spec: str, allowed: Collection[str], required: Collection[str] = (), level: str = ""
) -> Template:
    """The template in the file `spec`, in whose name "{level}" stands for `level`.

    allowed, required: placeholders that may and must occur. Space around the text is not part of it. Raises
    UserError where the file cannot be read or holds other placeholders.
    """
    return _read(resolve_existing(spec.replace("{level}", level), "template"), allowed, required)


def level_template(spec: str, level: str, allowed: Collection[str]) -> Template:
    """The template of a perturber; warns where it is the same for every level."""
    found = read_template(spec, allowed, ("caption",), level)
    if "{level}" not in spec and found.names <= {"caption", "context"}:
        log.warning("%s says nothing of the level: weak, medium and strong will be alike", spec)
    return found


def instruction(spec: str, level: str) -> Template:
    """What a chat model is told for a level: the file `spec`, or the one that ships with diffpref."""
    names = ("caption", "level")
    return level_template(spec, level, names) if spec else shipped_template(f"perturb-{level}", names)


def _read(file: Path, allowed: Collection[str], required: Collection[str]) -> Template:
    try:
        text = read_text(file).strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text", why=str(error), fix="save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: the template cannot be read", why=reason_of(error)) from None
    names = _placeholders(file, text, allowed)
    for name in required:
        if name not in names:
            raise UserError(
                f"{file}: the template has no {{{name}}}",
                why="the model would never see it",
                fix=f"write {{{name}}} where it is to stand",
            )
    return Template(text, frozenset(names))


def _placeholders(file: Path, text: str, allowed: Collection[str]) -> set[str]:
    """The placeholders of a template. Raises UserError for one that is not allowed, and for stray braces."""
    known = ", ".join(f"{{{name}}}" for name in allowed)
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(
            f"{file}: braces that do not match", why=str(error), fix="write {{ and }} for braces as such"
        ) from None
    names = set()
    for _, name, form, conversion in fields:
        if name is None:
            continue
        if name not in allowed or form or conversion:
            guess = nearest(name, allowed)
            raise UserError(
                f"{file}: unknown placeholder {{{name}}}",
                why=f"the placeholders are {known}",
                fix=f"did you mean {{{guess}}}?" if guess else "write {{ and }} for braces as such",
            )
        names.add(name)
    return names
