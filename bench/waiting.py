"""How long torch's threads spin before they sleep: training on quiet cores, and beside one busy process.

    python bench/waiting.py

Each contender is a process of its own that trains `demo-dpo` under another GOMP_SPINCOUNT; 300000 is
libgomp's default, `passive` sleeps at once. They take turns of a few steps. Then the same turns are run while
another process keeps one core busy. Rules for diffpref's choice: at most 3 % slower on quiet cores, at least
40 % of their speed beside the neighbour.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from racing import race, spread
from script import printed

from diffpref.environment import usable_cores

PAIRS = 64  # of a step of demo-dpo
STEPS = 100_000  # more than any contender takes
SPINS = ("300000", "30000", "3000", "1000", "passive")


class Worker:
    """`demo-dpo` in a process of its own, which takes a step for each line that it is sent."""

    def __init__(self, spins: str, work: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        choice = {"OMP_WAIT_POLICY": "PASSIVE"} if spins == "passive" else {"GOMP_SPINCOUNT": spins}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work", str(work), "--worker", spins],
            env={**kept, **choice}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.step(0)  # it has loaded everything, and the caches are there for the next one

    def step(self, number: int) -> None:
        del number
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print("step", file=self._process.stdin, flush=True)
        if not self._process.stdout.readline():
            raise SystemExit(f"a contender ended with code {self._process.wait()}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(work: Path, spins: str) -> None:
    """Train, one step for each line of stdin."""
    from diffpref.config import load_train_config
    from diffpref.paths import share_dir
    from diffpref.training.run import train
    from diffpref.training.stepper import Stepper

    take, answers = Stepper.take, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what training prints is no answer

    def on_demand(stepper: Stepper, step: int) -> bool:
        if not sys.stdin.readline():
            os._exit(0)
        done = take(stepper, step)
        print("done", file=answers, flush=True)
        return done

    places = {"output": str(work / spins), "data.cache_dir": str(work / "cache")}
    short = {"train.steps": str(STEPS), "validation.pairs": "8", "sampling.every": "0"}
    recipe = share_dir("configs") / "train" / "demo-dpo.toml"
    with mock.patch.object(Stepper, "take", on_demand):
        train(load_train_config(recipe, list({**places, **short}.items())))


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def run(values: argparse.Namespace, work: Path) -> str:
    workers = {spins: Worker(spins, work) for spins in values.spins}
    try:
        quiet, steps = race(workers, values.rounds, values.seconds, time.perf_counter)
        with busy_neighbour():
            beside, _ = race(workers, values.rounds, values.seconds, time.perf_counter)
    finally:
        for worker in workers.values():
            worker.end()
    about = (
        f"demo-dpo, two threads on {usable_cores()} cores, {values.rounds} rounds of about {steps} steps of "
        f"{PAIRS} pairs, wall time; medians, quartiles in brackets"
    )
    return f"{markdown(quiet, beside)}\n\n- {about}"


def markdown(quiet: dict[str, np.ndarray], beside: dict[str, np.ndarray]) -> str:
    """A table of seconds per step, of each contender in each round; the first is what others compare with."""
    first, *_ = quiet.values()
    lines = ["| spins | pairs/s, quiet | of the first | beside a neighbour | of quiet |", "| --- " * 5 + "|"]
    for spins, times in quiet.items():
        lines.append(
            f"| {spins} | {spread(PAIRS / times, '.1f')} | {spread(first / times, '.3f')} "
            f"| {spread(PAIRS / beside[spins], '.1f')} | {np.median(times) / np.median(beside[spins]):.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spins", nargs="+", default=list(SPINS), help="GOMP_SPINCOUNT of each, or passive")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each contender (default 12)")
    parser.add_argument("--seconds", type=float, default=200, help="about how long to measure each half")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    values = parser.parse_args(arguments)
    if values.worker:
        serve(values.work, values.worker)
        return 0
    with tempfile.TemporaryDirectory() as work:
        return printed(lambda: run(values, Path(work)))


if __name__ == "__main__":
    sys.exit(main())
