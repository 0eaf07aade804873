"""Evaluators: images and prompts to scores. ``EVALUATORS`` lists what exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from diffpref.errors import UserError
from diffpref.evaluators.base import Column, DetailedEvaluator, Evaluator, Runtime
from diffpref.evaluators.oracle import Oracle
from diffpref.suites import name_hint


def _published(module: str) -> Callable[[Runtime], Evaluator]:
    """`load` of a module, imported on use: torch and transformers take seconds."""

    def load(runtime: Runtime) -> Evaluator:
        import_module("diffpref.evaluators.torchvision_ops").mend_torchvision()
        evaluator: Evaluator = import_module(f"diffpref.evaluators.{module}").load(runtime)
        return evaluator

    return load


EVALUATORS: dict[str, Callable[[Runtime], Evaluator]] = {
    "oracle": lambda _: Oracle(),
    "image-reward": _published("image_reward"),
    "geneval": _published("geneval.evaluator"),
}

__all__ = ["EVALUATORS", "Column", "DetailedEvaluator", "Evaluator", "Runtime", "load_evaluators"]


def load_evaluators(names: Sequence[str], runtimes: Mapping[str, Runtime] | None = None) -> list[Evaluator]:
    """The evaluators of these names, in order, each once, with the runtimes given for some of them by name.

    Raises:
        UserError: no name, or one that does not exist; weights that are missing or do not fit.
    """
    if not names:
        raise UserError("no evaluator was named", fix=f"--evaluators NAME,...; {name_hint('', EVALUATORS)}")
    runtimes = runtimes or {}
    for name in (*names, *runtimes):
        if name not in EVALUATORS:
            raise UserError(f"there is no evaluator named {name!r}", fix=name_hint(name, EVALUATORS))
    return [EVALUATORS[name](runtimes.get(name, Runtime())) for name in dict.fromkeys(names)]
