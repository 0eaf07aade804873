"""Rules between settings: contradictions are errors, settings without effect are warned about."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from diffpref.config.schema import TrainConfig
from diffpref.errors import UserError

log = logging.getLogger("diffpref")


def check_rules(config: TrainConfig, source: str) -> None:
    """Raise UserError for settings that contradict one another, warn about those that change nothing."""
    for what, why, fix in contradictions(config):
        raise UserError(f"{source}: {what}", why, fix)
    for message in without_effect(config):
        log.warning("%s: %s", source, message)


def contradictions(config: TrainConfig) -> list[tuple[str, str, str]]:
    """What cannot be meant together, each as (what, why, fix)."""
    train, found = config.train, []
    if train.min_timestep > train.max_timestep:
        found.append(
            (
                f"train.min_timestep = {train.min_timestep} is above "
                f"train.max_timestep = {train.max_timestep}",
                "no timestep is left to train on",
                "make train.min_timestep the smaller one",
            )
        )
    if train.warmup_steps > train.steps:
        found.append(
            (
                f"train.warmup_steps = {train.warmup_steps} is more than train.steps = {train.steps}",
                "the learning rate would never reach its value",
                "lower train.warmup_steps",
            )
        )
    if train.micro_batch and train.batch_size % train.micro_batch:
        found.append(
            (
                f"train.micro_batch = {train.micro_batch} does not divide "
                f"train.batch_size = {train.batch_size}",
                "a step is made of whole micro-batches",
                "choose a divisor, or 0 for one micro-batch a step",
            )
        )
    if config.validation.every and not config.data.validation:
        found.append(
            (
                f"validation.every = {config.validation.every}, but data.validation is empty",
                "there are no held-out pairs to measure on",
                "name them in data.validation, or set validation.every to 0",
            )
        )
    if not config.output.strip():
        found.append(("output is empty", "a run needs a folder", 'such as output = "runs/train"'))
    return found


def without_effect(config: TrainConfig) -> list[str]:
    """Settings that were changed from their defaults and change nothing in this run."""
    found = []
    for condition, prefix, section, names in (
        (config.adapter.type == "none", "adapter", config.adapter, ("rank", "alpha", "target_modules")),
        (not config.log.wandb, "log", config.log, ("wandb_project",)),
        (not config.data.validation, "validation", config.validation, ("pairs", "draws")),
        (config.data.captions == "shared", "data.columns", config.data.columns, ("caption_0", "caption_1")),
        (bool(config.sampling.prompts), "sampling", config.sampling, ("count",)),
    ):
        if condition:
            found += [f"{prefix}.{name}" for name in names if _changed(section, name)]
    reasons = {
        "adapter": 'adapter.type is "none"',
        "log": "log.wandb is false",
        "validation": "data.validation is empty",
        "data": 'data.captions is "shared"',
        "sampling": "sampling.prompts are given",
    }
    return [f"{key} has no effect because {reasons[key.partition('.')[0]]}" for key in found]


def _changed(section: Any, name: str) -> bool:
    default = next(field.default for field in dataclasses.fields(section) if field.name == name)
    return bool(getattr(section, name) != default)
