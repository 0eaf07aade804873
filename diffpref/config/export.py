"""A config as plain dicts, as TOML that loads again, and the difference between two."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffpref.config.schema import ObjectiveConfig, TrainConfig
from diffpref.config.values import quote


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested dicts in the shape of the TOML file (objective parameters beside its name), ready for JSON."""
    return _tree(config)


def _tree(value: Any) -> Any:
    if isinstance(value, ObjectiveConfig):
        return {"name": value.name, **{key: _tree(item) for key, item in value.params.items()}}
    if dataclasses.is_dataclass(value):
        return {field.name: _tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def to_toml(config: TrainConfig) -> str:
    """The resolved config, every key included; loading it gives an equal config."""
    import tomlkit

    return tomlkit.dumps(to_dict(config))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def config_difference(a: TrainConfig, b: TrainConfig) -> list[str]:
    """What changed from `a` to `b`, a line each: "train.learning_rate: 1e-05 -> 2e-05"; empty when equal."""
    before, after = flatten(to_dict(a)), flatten(to_dict(b))
    lines = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if old != new:
            texts = ("(unset)" if value is None else quote(value) for value in (old, new))
            lines.append(f"{key}: " + " -> ".join(texts))
    return lines
