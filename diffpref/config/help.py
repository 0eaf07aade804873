"""The part of `diffpref train --help` that teaches every key: meaning, default and range, by section."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import MISSING, fields
from typing import Any

from diffpref.config.loading import keys, specs
from diffpref.config.schema import TrainConfig
from diffpref.config.values import Spec, quote

METAVARS = {str: "TEXT", int: "N", float: "X", bool: "true|false", tuple: "[...]"}


def add_config_arguments(parser: argparse.ArgumentParser, kind: type = TrainConfig, prefix: str = "") -> None:
    """Add an option for each key of a config class, by section, each with meaning, range and default.

    An option that is not given leaves nothing in the parsed namespace. Commands that take a whole config let
    `diffpref.config.overrides` collect the values instead: it also takes the parameters of objectives.
    """
    groups: dict[str, Any] = {}
    for key, spec in keys(kind, prefix).items():
        name = key.rpartition(".")[0]
        if name not in groups:
            title = f"[{name}] {_section_help(kind, name.removeprefix(prefix))}" if name else "top level"
            groups[name] = parser.add_argument_group(title.strip())
        text = describe(spec).replace("%", "%%")
        groups[name].add_argument(f"--{key}", metavar=metavar(spec), help=text, default=argparse.SUPPRESS)


def _section_help(kind: type, name: str) -> str:
    """What the schema says about a section, by its dotted name below `kind`."""
    text = ""
    for part in name.split("."):
        found = next((field for field in fields(kind) if field.name == part), None)
        if found is None:
            return ""
        text = found.metadata.get("help", "")
        section = specs(kind)[part]
        kind = section if isinstance(section, type) else kind
    return text


def metavar(spec: Spec) -> str:
    """What stands for the value of a key in help."""
    if spec.choices:
        return "|".join(str(choice) for choice in spec.choices if choice != "")
    return f"{METAVARS[spec.kind]}|{spec.word}" if spec.word else METAVARS[spec.kind]


def describe(spec: Spec) -> str:
    """Meaning, range and default in one line."""
    notes = [spec.allowed] if spec.bounds or spec.multiple_of > 1 else []
    notes.append("required" if spec.default is MISSING else f"default {_default(spec)}")
    return f"{spec.help} ({'; '.join(notes)})".strip()


def _default(spec: Spec) -> str:
    return "none" if spec.default is None else quote(spec.default)


def describe_objectives() -> str:
    """Each objective with the first line of its documentation and its parameters. Imports torch."""
    from diffpref.objectives import OBJECTIVES

    lines = ["objectives, the values of --objective.name, with their parameters:"]
    for name, kind in OBJECTIVES.items():
        summary = next((line.strip() for line in (kind.__doc__ or "").splitlines() if line.strip()), "")
        lines += textwrap.wrap(summary, 108, initial_indent=f"  {name:<8} ", subsequent_indent=" " * 11)
        for parameter, spec in specs(kind).items():
            assert isinstance(spec, Spec)
            head = f"    --objective.{parameter} {metavar(spec)}"
            text = f"{head:<33} {describe(spec)}"
            lines += textwrap.wrap(text, 108, subsequent_indent=" " * 34, drop_whitespace=True)
    return "\n".join(lines)
