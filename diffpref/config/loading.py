"""From a TOML file and overrides to a TrainConfig, or to one clear message about what does not fit."""

from __future__ import annotations

import dataclasses
import logging
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from diffpref.config.rules import check_rules
from diffpref.config.schema import ObjectiveConfig, TrainConfig
from diffpref.config.values import Spec, ValueProblem, check, from_text, quote, spec_of
from diffpref.errors import UserError, nearest
from diffpref.files import LARGEST_TEXT, parse_toml
from diffpref.paths import share_dir

log = logging.getLogger("diffpref")
Overrides = Iterable[tuple[str, str]] | Mapping[str, Any]
COMMAND_LINE = "the command line"


_MEANT = {
    "dcpo": '"dpo" with data.captions = "dual"',
    "dcpodpo": '"dpo" with data.captions = "dual"',
    "dcpomapo": '"mapo" with data.captions = "dual"',
    "dpo": '"dpo"',
    "diffusiondpo": '"dpo"',
    "ddpo": '"dpo", if Diffusion-DPO is meant: rewards by reinforcement are not there',
    "mapo": '"mapo"',
    "marginaware": '"mapo"',
    "sft": '"sft"',
    "supervised": '"sft"',
    "finetuning": '"sft"',
}
"""Names of methods, in small letters without marks, that go by another one here."""


def load_train_config(path: str | Path, overrides: Overrides = ()) -> TrainConfig:
    """Read a recipe and apply overrides, each a dotted key and its value (text is read as the key needs).

    `path` is a TOML file or the name of a shipped recipe. Raises UserError that names the file, the key and
    what is allowed for: a file that cannot be read, unknown or missing keys, wrong types, values out of
    range, and settings that contradict one another.
    """
    file = find_recipe(str(path))
    return parse_train_config(read_toml(file), overrides, source=str(file))


def parse_train_config(
    tree: Mapping[str, Any], overrides: Overrides = (), source: str = "config"
) -> TrainConfig:
    """Like `load_train_config`, from nested dicts; `source` names them in messages."""
    changes = dict(overrides.items() if isinstance(overrides, Mapping) else overrides)
    reader = _Reader(source, tree, changes)
    config = reader.section(TrainConfig, "", tree)
    reader.refuse_unknown()
    check_rules(config, source)
    return typing.cast(TrainConfig, config)


def find_recipe(name: str) -> Path:
    """The TOML file called `name`: a path, or a recipe that ships with diffpref (with or without ".toml")."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"config is a folder: {name}", fix="give the TOML file itself")
    if path.exists():
        return path
    recipes = {file.stem: file for file in sorted((share_dir("configs") / "train").glob("*.toml"))}
    stem = path.name.removesuffix(".toml")
    if stem in recipes and path.parent in (Path(), Path("configs/train")):
        return recipes[stem]
    close = nearest(stem, recipes)
    raise UserError(
        f"config not found: {name}",
        why="it is neither a file nor the name of a shipped recipe",
        fix=(f"did you mean {close!r}? " if close else "")
        + ("shipped recipes: " + ", ".join(recipes) if recipes else ""),
    )


def read_toml(file: Path) -> dict[str, Any]:
    """Parse a TOML file; raises UserError with the line of a syntax error."""
    try:
        with open(file, "rb") as stream:  # a pipe will do, too
            text = stream.read(LARGEST_TEXT + 1).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 text", why=str(error), fix="a config is a TOML text file"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read", why=str(error.strerror)) from None
    if len(text) > LARGEST_TEXT:
        raise UserError(f"{file}: not a config", why=f"it has more than {LARGEST_TEXT:,} characters")
    try:
        return parse_toml(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"at line (\d+)", str(error))
        lines = text.splitlines()
        line = f": {lines[int(found[1]) - 1].strip()}" if found and int(found[1]) <= len(lines) else ""
        raise UserError(f"{file}: not valid TOML", why=f"{error}{line}", fix=_syntax_hint(line)) from None


def _syntax_hint(line: str) -> str:
    if re.search(r"=\s*[A-Za-z_./~]", line) and not re.search(r"=\s*(true|false|inf|nan)\b", line):
        return 'text needs quotes: key = "value"'
    return "one key = value per line, sections as [name]"


def specs(kind: type) -> dict[str, Spec | type]:
    """What each field of a config dataclass accepts: a Spec, or the dataclass of a nested section."""
    hints = typing.get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if field.init and field.name in hints]
    if kind is ObjectiveConfig:
        fields = [field for field in fields if field.name == "name"]
    return {
        field.name: hints[field.name]
        if dataclasses.is_dataclass(hints[field.name])
        else spec_of(field, hints[field.name])
        for field in fields
    }


def keys(kind: type = TrainConfig, prefix: str = "") -> dict[str, Spec]:
    """All dotted keys below a config dataclass with what they accept, objective parameters left out."""
    found: dict[str, Spec] = {}
    for name, spec in specs(kind).items():
        found |= {prefix + name: spec} if isinstance(spec, Spec) else keys(spec, f"{prefix}{name}.")
    return found


class _Reader:
    """Walks the schema over one tree and its overrides, and remembers which keys the schema knows."""

    def __init__(self, source: str, tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
        self.source, self.tree, self.overrides = source, tree, overrides
        self.known: dict[str, Spec | type] = {}

    def section(self, kind: type, prefix: str, table: Mapping[str, Any]) -> Any:
        if kind is ObjectiveConfig:
            return self.objective(prefix, table)
        return kind(**self.fields(specs(kind), prefix, table))

    def fields(
        self, accepted: Mapping[str, Spec | type], prefix: str, table: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The values of one section's fields, nested sections included."""
        self.known |= {prefix + name: spec for name, spec in accepted.items()}
        self._refuse_unknown_in(table, prefix, accepted)
        values: dict[str, Any] = {}
        for name, spec in accepted.items():
            if isinstance(spec, Spec):
                values[name] = self.value(prefix + name, spec, table.get(name, MISSING))
            else:
                values[name] = self.section(spec, f"{prefix}{name}.", self._subtable(table, prefix, name))
        return values

    def value(self, key: str, spec: Spec, value: Any) -> Any:
        """One value: of the overrides, else of the file, else the default."""
        origin = self.source
        if key in self.overrides:
            origin, value = COMMAND_LINE, self.overrides[key]
        if value is MISSING:
            if spec.default is MISSING:
                raise self._missing(key, spec)
            return spec.default
        try:
            if origin is COMMAND_LINE and isinstance(value, str):
                return from_text(value, spec)
            return check(value, spec)
        except ValueProblem as problem:
            what = f"{origin}: {key} = {quote(value)} is not allowed"
            raise UserError(what, why=str(problem), fix=problem.hint) from None

    def objective(self, prefix: str, table: Mapping[str, Any]) -> ObjectiveConfig:
        """The objective's name and parameters, checked against the class of that name."""
        from diffpref.objectives import OBJECTIVES  # it imports torch, which --help does without

        spec = specs(ObjectiveConfig)["name"]
        assert isinstance(spec, Spec)
        spec = dataclasses.replace(spec, choices=tuple(OBJECTIVES))
        key = f"{prefix}name"
        asked = self.overrides.get(key, table.get("name"))
        meant = _MEANT.get(re.sub(r"[^a-z0-9]", "", asked.lower())) if isinstance(asked, str) else None
        if meant and asked not in OBJECTIVES:
            raise UserError(
                f'{COMMAND_LINE if key in self.overrides else self.source}: {key} = "{asked}" is not allowed',
                fix=f"that method is {key} = {meant}",
            )
        name = self.value(f"{prefix}name", spec, table.get("name", MISSING))
        if name != table.get("name", spec.default) and set(table) - {"name"}:
            dropped = ", ".join(f"{prefix}{key}" for key in table if key != "name")
            log.warning(
                "%s belongs to another objective and is not used with %s: %s", dropped, name, self.source
            )
            table = {}
        accepted: dict[str, Spec | type] = {"name": spec, **specs(OBJECTIVES[name])}
        params = self.fields(accepted, prefix, {"name": name} | dict(table))
        del params["name"]
        try:
            objective = OBJECTIVES[name](**params)
        except UserError as error:
            raise UserError(f"{self.source}: {error.what}", error.why, error.fix) from None
        effective = {
            key: getattr(objective, key) for key in params
        }  # defaults that depend on others, filled in
        return ObjectiveConfig(name, {key: value for key, value in effective.items() if value is not None})

    def refuse_unknown(self) -> None:
        """Raise for an override of a key that no section has."""
        for key in self.overrides:
            spec = self.known.get(key)
            if not isinstance(spec, Spec):
                raise self._unknown(COMMAND_LINE, key)

    def _refuse_unknown_in(self, table: Mapping[str, Any], prefix: str, accepted: Mapping[str, Any]) -> None:
        for name in table:
            if name not in accepted:
                raise self._unknown(self.source, prefix + name)

    def _subtable(self, table: Mapping[str, Any], prefix: str, name: str) -> Mapping[str, Any]:
        found = table.get(name, {})
        if not isinstance(found, Mapping):
            what = f"{self.source}: {prefix}{name} = {quote(found)} is not allowed"
            raise UserError(
                what, why=f"{prefix}{name} is a section", fix=f"write its keys below [{prefix}{name}]"
            )
        return found

    def _missing(self, key: str, spec: Spec) -> UserError:
        section, _, name = key.rpartition(".")
        return UserError(
            f"{self.source}: {key} is missing",
            why=f"it has no default: {spec.help}",
            fix=f"add it below [{section}]: {name} = ..., or give --{key} VALUE",
        )

    def _unknown(self, origin: str, key: str) -> UserError:
        prefix, _, leaf = key.rpartition(".")
        known = {**keys(), **self.known}
        siblings = sorted(name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == prefix)
        close = nearest(leaf, siblings)
        if close:
            close = f"{prefix}.{close}" if prefix else close
        else:  # right name, wrong section; else a section or key spelt alike
            same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
            close = same_leaf[0] if same_leaf else nearest(key, known if prefix not in known else ())
        if isinstance(self.known.get(key), type):
            return UserError(
                f"{origin}: {key} is a section, not a key",
                fix=f"give one of its keys, such as --{key}.NAME VALUE",
            )
        return UserError(
            f"{origin}: unknown key {key}",
            why=f"known in this section: {', '.join(siblings)}" if siblings else "",
            fix=f"did you mean {close}?" if close else "see diffpref train --help for all keys",
        )
