"""Evaluators: images and prompts to scores. ``EVALUATORS`` lists what exists."""

from __future__ import annotations

from diffpref.errors import UserError
from diffpref.evaluators.base import Column, DetailedEvaluator, Evaluator
from diffpref.evaluators.oracle import Oracle
from diffpref.suites import name_hint

EVALUATORS: dict[str, type[Evaluator]] = {"oracle": Oracle}

__all__ = ["EVALUATORS", "Column", "DetailedEvaluator", "Evaluator", "load_evaluators"]


def load_evaluators(names: list[str]) -> list[Evaluator]:
    """The evaluators of these names, in order, each once.

    Raises:
        UserError: no name, or one that does not exist.
    """
    if not names:
        raise UserError("no evaluator was named", fix=f"--evaluators NAME,...; {name_hint('', EVALUATORS)}")
    for name in names:
        if name not in EVALUATORS:
            raise UserError(f"there is no evaluator named {name!r}", fix=name_hint(name, EVALUATORS))
    return [EVALUATORS[name]() for name in dict.fromkeys(names)]
