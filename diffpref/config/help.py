"""The part of `diffpref train --help` that teaches every key: meaning, default and range, by section."""

from __future__ import annotations

import argparse
from dataclasses import MISSING
from typing import Any

from diffpref.config.loading import keys, specs
from diffpref.config.schema import TrainConfig
from diffpref.config.values import Spec, quote

METAVARS = {str: "TEXT", int: "N", float: "X", bool: "true|false", tuple: "[...]"}


def add_config_arguments(parser: argparse.ArgumentParser, section: str = "") -> None:
    """List the keys of a training config in `parser`'s help, grouped by section (or those below one `section`).

    The values themselves are taken from the command line by `diffpref.config.overrides`, which also knows the
    parameters of the objectives and names the nearest key for a misspelt one.
    """
    described = {name: field.metadata.get("help", "") for name, field in TrainConfig.__dataclass_fields__.items()}
    groups: dict[str, Any] = {}
    for key, spec in keys().items():
        name = key.rpartition(".")[0]
        if section and key.partition(".")[0] != section and not key.startswith(f"{section}."):
            continue
        if name not in groups:
            text = described.get(name, "names of the Parquet columns" if name else "")
            groups[name] = parser.add_argument_group(f"[{name}] {text}" if name else "top level")
        groups[name].add_argument(f"--{key}", metavar=_metavar(spec), help=describe(spec), default=argparse.SUPPRESS)


def _metavar(spec: Spec) -> str:
    return "|".join(spec.choices) if spec.choices else METAVARS[spec.kind]


def describe(spec: Spec) -> str:
    """Meaning, range and default in one line."""
    notes = []
    if spec.bounds or spec.multiple_of > 1:
        notes.append(spec.allowed)
    notes.append("required" if spec.default is MISSING else f"default {_default(spec)}")
    text = f"{spec.help} ({'; '.join(notes)})" if spec.help else "; ".join(notes)
    return text.replace("%", "%%")


def _default(spec: Spec) -> str:
    return "none" if spec.default is None else quote(spec.default)


def describe_objectives() -> str:
    """Each objective with the first line of its documentation and its parameters. Imports torch."""
    from diffpref.objectives import OBJECTIVES

    lines = ["objectives (objective.name) and their parameters (--objective.NAME VALUE):"]
    for name, kind in OBJECTIVES.items():
        summary = next((line.strip() for line in (kind.__doc__ or "").splitlines() if line.strip()), "")
        lines.append(f"  {name:<10} {summary}")
        for parameter, spec in specs(kind).items():
            assert isinstance(spec, Spec)
            lines.append(f"      --objective.{parameter} {_metavar(spec)}  {describe(spec).replace('%%', '%')}")
    return "\n".join(lines)
