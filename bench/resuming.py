"""Time to the first step of a run that is resumed at step 10,000, against one that begins.

    python bench/resuming.py

Both are `diffpref train`'s own code on the same config, from its start to the end of its first optimizer
step, in one process, in turns: imports are left out, which would hide the difference. The checkpoint is a
real run's after two steps, saved again by the package's own `Checkpoints` as step 10,000, with the rows of
metrics.jsonl that a run has by then. The caches are there already for both. Goal: at most 1.2 times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from racing import spread
from samples import noise_pairs, take_pairs
from script import printed
from tqdm import tqdm

from diffpref.config import TrainConfig
from diffpref.config.loading import parse_train_config
from diffpref.environment import usable_cores
from diffpref.families.miniature import stable_diffusion
from diffpref.training.checkpoint import Checkpoints
from diffpref.training.run import train
from diffpref.training.stepper import Stepper
from diffpref.training.stop import Stopped

MINIATURE = "miniature"
GOAL = 1.2


def make_config(values: argparse.Namespace, work: Path) -> TrainConfig:
    mini = values.model == MINIATURE
    rows = noise_pairs(values.count, 64) if mini else take_pairs(values.pairs, values.count)
    pq.write_table(pa.Table.from_pylist(rows), work / "pairs.parquet")
    tree = {
        "output": str(work / "run"),
        "model": {"base": str(stable_diffusion(work / "model")) if mini else values.model},
        "data": {
            "pairs": str(work / "pairs.parquet"), "resolution": 64, "cache_dir": str(work / "cache"),
        },
        "reference": {"kind": values.reference},
        "train": {
            "steps": 2 * values.step, "batch_size": values.batch, "learning_rate": 1e-6,
            "threads": values.threads,
        },
        "checkpoint": {"every": 0},
        "sampling": {"count": 0},
    }  # fmt: skip
    return parse_train_config(tree)


@contextlib.contextmanager
def stopped_after(steps: int, ends: list[tuple[int, float]]) -> Any:
    """In the block a run stops, without saving, after `steps` steps; their numbers and ends go to `ends`."""
    take = Stepper.take

    def timed(stepper: Stepper, step: int) -> bool:
        stopping = take(stepper, step)
        stepper.settle()
        ends.append((step, time.perf_counter()))
        if len(ends) == steps:
            raise Stopped
        return stopping

    with mock.patch.object(Stepper, "take", timed):
        yield


def first_step(config: TrainConfig) -> tuple[int, float, float]:
    """Number of the first step of a run of `config`, seconds from the run's start to its end, and seconds of
    the next step."""
    ends: list[tuple[int, float]] = []
    started = time.perf_counter()
    with stopped_after(2, ends):
        train(config)
    (first, end), (_, next_end) = ends
    return first, end - started, next_end - end


def make_resumable(config: TrainConfig, step: int) -> None:
    """Leave in the output folder of `config` what a run stopped at `step` leaves there."""
    run, last = Path(config.output), 2
    take = Stepper.take

    def told_to_stop(stepper: Stepper, number: int) -> bool:
        return take(stepper, number) or number == last

    with mock.patch.object(Stepper, "take", told_to_stop):
        train(config)
    checkpoints = Checkpoints(run / "checkpoints", keep=1)
    real = checkpoints.latest()
    assert real is not None
    assert real.step == last
    groups = {path.stem: real.tensors(path.stem) for path in real.path.glob("*.safetensors")}
    groups["optimizer"] = {
        name: value.new_full((), step) if name.startswith("step/") else value
        for name, value in groups["optimizer"].items()
    }
    checkpoints.save(step, groups, {**real.state(), "step": step})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    every = range(config.log.every, step + 1, config.log.every)
    told = [rows[0], *({**rows[-1], "step": number} for number in every)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))


def run(values: argparse.Namespace, work: Path) -> str:
    config = make_config(values, work)
    make_resumable(config, values.step)
    kept, folder = work / "kept", Path(config.output)
    folder.rename(kept)
    times: dict[str, list[float]] = {"begun": [], "resumed": []}
    steps: list[float] = []
    for number in tqdm(range(values.rounds + 1), desc="rounds", unit="round"):
        for name in sorted(times, reverse=bool(number % 2)):
            if name == "resumed":
                shutil.copytree(kept, folder)
            first, seconds, further = first_step(config)
            shutil.rmtree(folder)
            assert first == (values.step + 1 if name == "resumed" else 1)
            if number:  # the first round warms files and kernels up
                times[name].append(seconds)
                steps.append(further)
    if values.json:
        values.json.write_text(json.dumps({"seconds_to_first_step": times, "step": values.step}) + "\n")
    about = (
        f"a further step takes {np.median(steps):.2f} s; model {values.model}, reference.kind "
        f"{values.reference}, {values.count} pairs, {values.batch} a step, {values.rounds} rounds on "
        f"{usable_cores()} CPU cores; medians, quartiles in brackets"
    )
    return markdown(np.array(times["begun"]), np.array(times["resumed"]), values.step, about)


def markdown(begun: np.ndarray, resumed: np.ndarray, step: int, about: str) -> str:
    ratio = spread(resumed / begun, ".3f")
    return "\n".join(
        [
            "| a run | seconds to its first step |",
            "| --- | --- |",
            f"| begun | {spread(begun, '.2f')} |",
            f"| resumed at step {step:,} | {spread(resumed, '.2f')} |",
            "",
            f"- resumed / begun: **{ratio}** (goal: at most {GOAL})",
            f"- {about}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="tiny:model", help=f"or {MINIATURE}: random weights, no data needed"
    )
    parser.add_argument("--pairs", default="tiny:pairs/train.parquet", help="one Parquet file")
    parser.add_argument("--step", type=int, default=10_000, help="to resume at (default 10000)")
    parser.add_argument("--reference", default="auto", choices=("auto", "cached"), help="reference.kind")
    parser.add_argument("--count", type=int, default=256, help="pairs to train on (default 256)")
    parser.add_argument("--batch", type=int, default=16, help="pairs a step (default 16)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each (default 8)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as torch chooses")
    parser.add_argument("--json", type=Path, help="also write every round's time here")
    values = parser.parse_args(arguments)
    logging.getLogger("diffpref").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as work:
        return printed(lambda: run(values, Path(work)))


if __name__ == "__main__":
    sys.exit(main())
