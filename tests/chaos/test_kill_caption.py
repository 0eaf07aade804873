"""`kill -9` of `diffpref caption` at random moments: the bytes are those of a run never killed, and no call
of the captioner is repeated but those of the batch that each worker was in."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.caption_backends import asked, write_pairs

ROWS, ROWS_PER_FILE, BATCH = 150, 20, 3
LOCAL, RAY = ["--workers", "2"], ["--engine", "ray", "--workers", "2"]


def start(pairs: Path, out: Path, calls: Path, *options: str) -> subprocess.Popen[bytes]:
    arguments = [
        "--pairs", pairs, "--out", out, "--method", "hybrid", "--captioner", "colours",
        "--captioner.calls", calls, "--captioner.delay", "0.03", "--perturber.level", "strong",
        "--rows-per-file", ROWS_PER_FILE, "--batch", BATCH, *options,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "tests.caption_backends", "caption", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[bytes]) -> None:
    assert process.wait(300) == 0, process.stderr and process.stderr.read()


def parts(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*.parquet"))}


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at_random(process: subprocess.Popen[bytes], calls: Path, moments: random.Random, most: int) -> bool:
    """Kill after up to `most` more calls and a moment; whether it was still running."""
    goal = lines(calls) + moments.randint(0, most)
    while process.poll() is None and lines(calls) <= goal:
        time.sleep(0.001)
    time.sleep(moments.uniform(0.0, 0.05))
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def check(tmp_path: Path, options: list[str], kills: int, workers: int, most: int) -> None:
    pairs = write_pairs(tmp_path / "p.parquet", ROWS, group=40)
    finish(start(pairs, tmp_path / "whole", tmp_path / "calls-whole"))
    out, calls, moments, killed = tmp_path / "out", tmp_path / "calls", random.Random(11), 0
    before: dict[str, bytes] = {}
    while killed < kills and kill_at_random(start(pairs, out, calls, *options), calls, moments, most):
        killed += 1
        now = parts(out)
        assert before.items() <= now.items()
        before = now
    assert killed == kills, f"the run ended after {killed} kills: make it longer"
    finish(start(pairs, out, calls, *options))
    assert parts(out) == parts(tmp_path / "whole")
    assert not list(out.glob(".part*"))
    times = Counter(row for call in asked(calls) for row in call)
    assert set(times) == set(range(2 * ROWS))
    again = sum(times.values()) - len(times)
    assert again <= killed * workers * 2 * BATCH, f"{again} calls were repeated after {killed} kills"


def test_killed_ten_times_equals_never_killed(tmp_path):
    check(tmp_path, [], kills=10, workers=1, most=3)


@pytest.mark.slow
def test_killed_with_workers(tmp_path):
    check(tmp_path, LOCAL, kills=3, workers=2, most=9)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_under_ray(tmp_path):
    check(tmp_path, RAY, kills=10, workers=2, most=4)
