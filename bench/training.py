"""From the usual order of operations to diffpref's, one switch a row; and the trainer beside a bare loop.

    python bench/training.py

All contenders train the same model on the same pairs, in one process, in turns:

usual     a plain loop: every step decodes the images, resizes them, runs VAE, text encoder, reference, policy
text      diffpref's trainer, data.cache_latents = false: only the text is cached
latents   diffpref's trainer as it comes: latents and text are cached
errors    reference.kind = "cached": the reference's errors too
lora      adapter.type = "lora": latents and text cached, the reference is the policy without its adapters
bare      the operations of `latents` in a plain loop over tensors in memory: no cache files, seeds, metrics
          or checks

It prints pairs per second, each row's ratio to the first beside the ratio of their FLOPs, counted on a real
step of each, and the trainer's overhead over the bare loop. Turns are short and interleaved, so that a busy
machine slows all alike; on a CPU that others use as well, --clock cpu --threads 1 counts the time that this
process got.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from counting import flops_of
from loops import BETA, Bare, Usual
from PIL import Image
from racing import CLOCKS, Contender, race, spread
from samples import noise_pairs, take_pairs
from script import printed
from tqdm import tqdm

from diffpref.config import TrainConfig
from diffpref.config.loading import parse_train_config
from diffpref.data.cache import build_cache
from diffpref.data.pairs import open_pairs
from diffpref.environment import usable_cores
from diffpref.errors import UserError
from diffpref.families import Family, load_family
from diffpref.families.miniature import stable_diffusion
from diffpref.objectives import OBJECTIVES
from diffpref.training.policy import prepare_unet
from diffpref.training.setup import Launch, check_model, make_launch
from diffpref.training.stop import StopRequest
from diffpref.training.trainer import Trainer

MINIATURE = "miniature"
MOST_STEPS = 20_000  # of a contender: reference errors are taken for a plan of all steps

SWITCHES: dict[str, dict[str, Any]] = {
    "text": {"data.cache_latents": False},
    "latents": {},
    "errors": {"reference.kind": "cached"},
    "lora": {"adapter.type": "lora"},
}
MEANINGS = {
    "usual": "usual: decode, VAE, text encoder, reference, policy",
    "text": "diffpref, text cached: decode, VAE, reference, policy",
    "latents": "diffpref, latents and text cached (the default): reference, policy",
    "errors": "diffpref, reference errors cached too: policy",
    "lora": "diffpref, latents and text cached, LoRA: adapters off, policy",
    "bare": "bare loop over latents and text in memory: reference, policy",
}


class Trained:
    """diffpref's trainer, step by step, with everything it does between steps."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._bar: tqdm[Any] = tqdm(disable=True)

    def step(self, number: int) -> None:
        assert number == self._trainer.step
        self._trainer._after_step(self._bar, self._trainer._timed_step())


@dataclass(frozen=True)
class Setting:
    """What all contenders share."""

    tree: dict[str, Any]
    work: Path
    rows: list[dict[str, Any]]
    family: Family
    launch: Launch

    def config(self, switches: Mapping[str, Any]) -> TrainConfig:
        return parse_train_config(self.tree, switches)

    def contender(self, name: str) -> Contender:
        config, accelerator = self.config(SWITCHES.get(name, {})), self.launch.accelerator
        if name == "usual":
            return Usual(config, accelerator, self.family, self.rows)
        table = open_pairs(config.data.pairs)
        cache = build_cache(table, self.family, config.data, self.work / "cache", named=False)
        if len(cache) != len(self.rows):
            raise UserError(f"{len(self.rows) - len(cache)} of {len(self.rows)} pairs cannot be decoded")
        if name == "bare":
            return Bare(config, accelerator, self.family, cache)
        base = self.family.unet
        self.family.unet = copy.deepcopy(base)  # each trainer takes the family's own UNet as its policy
        prepare_unet(self.family.unet, config)
        objective = OBJECTIVES["dpo"](beta=BETA)  # type: ignore[call-arg]
        folder = self.work / f"run-{name}"
        folder.mkdir()
        trainer = Trainer(
            config, accelerator, self.family, objective, {"train": cache}, self.work / "cache", {}, [],
            folder, None, self.launch.strategy, StopRequest(),
        )  # fmt: skip
        self.family.unet = base
        return Trained(trainer)


def prepare(values: argparse.Namespace, work: Path) -> Setting:
    mini = values.model == MINIATURE
    rows = noise_pairs(values.count, values.resolution) if mini else take_pairs(values.pairs, values.count)
    pq.write_table(pa.Table.from_pylist(rows), work / "pairs.parquet")
    tree = {
        "output": str(work / "run"),
        "model": {"base": str(stable_diffusion(work / "model")) if mini else values.model},
        "data": {"pairs": str(work / "pairs.parquet"), "resolution": values.resolution},
        "objective": {"name": "dpo", "beta": BETA},
        "train": {
            "steps": MOST_STEPS, "batch_size": values.batch, "learning_rate": 1e-6, "threads": values.threads,
            "mixed_precision": values.precision,
        },
        "checkpoint": {"every": 0},
        "sampling": {"count": 0},
    }  # fmt: skip
    config = parse_train_config(tree)
    launch = make_launch(config)
    family = load_family(config.model)
    check_model(config, family)
    family.to(launch.accelerator.device)
    prepare_unet(family.unet, config)
    return Setting(tree, work, rows, family, launch)


def markdown(
    times: Mapping[str, np.ndarray], flops: Mapping[str, float], batch: int, notes: list[str]
) -> str:
    """What the bench prints: a row per contender, and the overhead; medians, quartiles in brackets."""
    lines = [
        "| order of operations | pairs/s | over the usual | by FLOPs | share of that | GFLOPs a pair |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, meaning in MEANINGS.items():
        ratio, bound = times["usual"] / times[name], flops["usual"] / flops[name]
        lines.append(
            f"| {meaning} | {spread(batch / times[name], '.2f')} | {spread(ratio, '.3f')} | {bound:.3f} "
            f"| {np.median(ratio) / bound:.3f} | {flops[name] / 1e9:.3g} |"
        )
    share = np.median(times["usual"] / times["latents"]) * flops["latents"] / flops["usual"]
    overhead = 100 * (times["latents"] / times["bare"] - 1)
    goals = [
        f"default over usual: **{share:.3f}** of the ratio of FLOPs (goal: at least 0.9)",
        f"trainer's overhead over the bare loop: **{spread(overhead, '.1f')} %** (goal: at most 3 %)",
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in goals + notes)])


def run(values: argparse.Namespace, work: Path) -> str:
    setting = prepare(values, work)
    clock = CLOCKS[values.clock]
    contenders, seconds = {}, {}
    for name in MEANINGS:
        started = clock()
        contenders[name] = setting.contender(name)
        seconds[name] = clock() - started
    flops = {name: flops_of(lambda one=one: one.step(0)) / values.batch for name, one in contenders.items()}
    times, steps = race(contenders, values.rounds, values.seconds, clock, done=1, limit=MOST_STEPS - 1)
    draws = setting.config(SWITCHES["errors"]).reference.draws
    taken = max(seconds["errors"] - seconds["lora"], 0.0)  # both find the other caches there
    notes = [
        f"reference errors of {len(setting.rows)} pairs, {draws} draws each, were taken beforehand in "
        f"{taken:.1f} s, the time of {taken / np.median(times['errors']):.0f} steps on them",
        _about(values, setting.rows, steps, setting.launch.accelerator.device),
    ]
    if values.json:
        numbers = {name: list(map(float, taken)) for name, taken in times.items()}
        found = {"seconds_per_step": numbers, "flops_per_pair": flops, "pairs_per_step": values.batch}
        values.json.write_text(json.dumps(found) + "\n")
    return markdown(times, flops, values.batch, notes)


def _about(values: argparse.Namespace, rows: list[dict[str, Any]], steps: int, device: torch.device) -> str:
    with Image.open(io.BytesIO(rows[0]["jpg_0"])) as image:
        kind = f"{image.format} {image.width}x{image.height}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{usable_cores()} CPU cores"
    return (
        f"{where}, threads: {torch.get_num_threads()}, torch {torch.__version__}, precision "
        f"{values.precision}, {values.clock} time; model {values.model}, images {kind} trained at "
        f"{values.resolution}, {values.batch} pairs a step, {values.rounds} rounds of {steps} steps; "
        "medians, quartiles in brackets; FLOPs of matrix products and convolutions, backward passes as run"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="tiny:model", help=f"or {MINIATURE}: random weights, no data needed"
    )
    parser.add_argument("--pairs", default="tiny:pairs/train.parquet", help="one Parquet file")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--count", type=int, default=256, help="pairs to train on (default 256)")
    parser.add_argument("--batch", type=int, default=32, help="pairs a step (default 32)")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each contender (default 12)")
    parser.add_argument("--seconds", type=float, default=150, help="about how long to measure (default 150)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as torch chooses")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--json", type=Path, help="also write every round's time here")
    values = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        return printed(lambda: run(values, Path(work)))


if __name__ == "__main__":
    sys.exit(main())
