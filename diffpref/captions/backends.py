"""Captioners and perturbers by name: made from the texts of a command line, described in its help."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffpref.config.help import describe, metavar
from diffpref.config.loading import specs
from diffpref.config.values import Spec, ValueProblem, from_text
from diffpref.errors import UserError, nearest

B = TypeVar("B")
RUNTIME = frozenset(
    {"device", "batch_size", "concurrency", "timeout", "retries", "journal", "api_key_env", "url"}
)
"""Settings of backends that change no caption: a run may go on with others."""
_IN_PROVENANCE = frozenset({"template", "revision"})
_NEWER = frozenset({"detail"})
"""Settings that folders of earlier versions do not name; empty ones are as if they were not there."""


def build_backend(kind: str, name: str, known: Mapping[str, type[B]], texts: Mapping[str, str]) -> B:
    """The backend `name` of `known` with settings from texts (key -> text), checked against its fields.

    kind: "captioner" or "perturber". Raises UserError for unknown names and keys, and values that do not fit.
    """
    if name not in known:
        close = nearest(name, known)
        raise UserError(
            f"unknown {kind} {name!r}",
            why=f"there are: {', '.join(known)}",
            fix=f"did you mean {close}?" if close else f"see diffpref caption --help for each {kind}",
        )
    accepted = backend_specs(known[name])
    values: dict[str, Any] = {}
    for key, text in texts.items():
        if key not in accepted:
            raise _unknown(kind, name, key, known)
        try:
            values[key] = from_text(text, accepted[key])
        except ValueProblem as problem:
            what = f"--{kind}.{key} {text} is not allowed"
            raise UserError(what, why=str(problem), fix=problem.hint) from None
    for key, spec in accepted.items():
        if spec.default is dataclasses.MISSING and key not in values:
            raise UserError(
                f"--{kind} {name} needs --{kind}.{key}", why=spec.help, fix=f"--{kind}.{key} VALUE"
            )
    return known[name](**values)


def backend_specs(backend: type) -> dict[str, Spec]:
    """What each setting of a backend accepts."""
    return {name: spec for name, spec in specs(backend).items() if isinstance(spec, Spec)}


def backend_key(kind: str, backend: Any) -> dict[str, Any]:
    """The settings that decide its captions, and its provenance, by the names of their options."""
    if backend is None:
        return {kind: ""}
    made = dataclasses.asdict(backend.provenance())
    settings = {
        f"{kind}.{field.name}": getattr(backend, field.name)
        for field in dataclasses.fields(backend)
        if field.name not in RUNTIME | _IN_PROVENANCE
        and (field.name not in _NEWER or getattr(backend, field.name))
    }
    traced = {f"{kind}.{name}": made[name] for name in ("revision", "template")}
    return {kind: made["backend"], **settings, **traced}


def with_journal(backend: B, folder: Path) -> B:
    """The backend with its answers kept in `folder`, where it keeps answers and was not told where."""
    if getattr(backend, "journal", None) == "":
        return dataclasses.replace(backend, journal=str(folder))  # type: ignore[type-var]
    return backend


def reach_before_paying(captioner: Any, perturber: Any) -> None:
    """Let a captioner that is asked over the network see that the perturber can work before its first request
    is sent: captions that nothing comes of would be paid for."""
    before_first_request = getattr(captioner, "before_first_request", None)
    if before_first_request is not None:
        before_first_request(getattr(perturber, "reach", None))


def on_device(backend: B, device: str) -> B:
    """The backend on a worker's device, where it has one and was not told which; "" leaves it."""
    if device and getattr(backend, "device", None) == "auto":
        return dataclasses.replace(backend, device=device)  # type: ignore[type-var]
    return backend


def wants_device(backend: Any) -> bool:
    """Whether a worker may choose the device of the backend."""
    return getattr(backend, "device", None) == "auto"


def describe_backends(kind: str, known: Mapping[str, type]) -> str:
    """Each backend with the first line of its documentation and its settings, as lines of help."""
    lines: list[str] = []
    for name, backend in known.items():
        summary = next((line.strip() for line in (backend.__doc__ or "").splitlines() if line.strip()), "")
        lines += textwrap.wrap(summary, 106, initial_indent=f"  {name}: ", subsequent_indent="    ")
        for key, spec in backend_specs(backend).items():
            head = f"    --{kind}.{key} {metavar(spec)}"
            lines += textwrap.wrap(f"{head:<41} {describe(spec)}", 106, subsequent_indent=" " * 42)
    return "\n".join(lines)


def _unknown(kind: str, name: str, key: str, known: Mapping[str, type]) -> UserError:
    own = list(backend_specs(known[name]))
    close = nearest(key, own)
    others = [other for other, backend in known.items() if key in backend_specs(backend)]
    why = f"it has {', '.join(own)}" if own else "it has no settings"
    if others and not close:
        why += f"; {key} is one of {' and '.join(others)}"
    return UserError(
        f"--{kind}.{key} does not belong to --{kind} {name}",
        why=why,
        fix=f"did you mean --{kind}.{close}?" if close else f"leave --{kind}.{key} out",
    )
