"""Evaluators: images and prompts to scores. ``EVALUATORS`` lists what exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from diffpref.errors import UserError
from diffpref.evaluators import oracle
from diffpref.evaluators.base import Column, DetailedEvaluator, Evaluator, Runtime
from diffpref.suites import name_hint


def _late(module: str, **parameters: Any) -> Callable[[Runtime], Evaluator]:
    """``load`` of a module that is imported on use: torch and transformers take seconds."""

    def load(runtime: Runtime) -> Evaluator:
        found: Evaluator = import_module(f"diffpref.evaluators.{module}").load(runtime, **parameters)
        return found

    return load


EVALUATORS: dict[str, Callable[[Runtime], Evaluator]] = {
    "oracle": oracle.load,
    "pickscore": _late("pickscore"),
    "hps-v2": _late("hps", version="v2", antialias=True),
    "hps-v2-aliased": _late("hps", version="v2", antialias=False),
    "hps-v2.1": _late("hps", version="v2.1", antialias=True),
    "hps-v2.1-aliased": _late("hps", version="v2.1", antialias=False),
    "clipscore": _late("clip_score", preset="cosine"),
    "clipscore-jmhessel": _late("clip_score", preset="jmhessel"),
    "clipscore-torchmetrics": _late("clip_score", preset="torchmetrics"),
    "hps-v3": _late("hps_v3"),
    "aesthetic": _late("aesthetic"),
    "image-reward": _late("image_reward"),
    "vqascore": _late("vqascore"),
    "geneval": _late("geneval.evaluator"),
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
