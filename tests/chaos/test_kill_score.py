"""`kill -9` of `diffpref score` at random moments, and two processes of it: the bytes are those of one
process that was never disturbed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[2]
COUNT = 420
KILLS = 2
COMMAND = ["-m", "tests.evaluators", "score"]
OPTIONS = ["--evaluators", "smallnet,oracle", "--batch", "16"]


def write_images(folder: Path) -> Path:
    """Images of several sizes with prompts of several lengths."""
    (folder / "images").mkdir(parents=True)
    words = ("red", "blue", "green")
    lines = []
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number % 7, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        prompt = f"a {words[number % 3]} circle" if number % 2 else f"a {words[number % 3]} square"
        lines.append(json.dumps({"file": f"images/{number}.png", "prompt": prompt, "prompt_id": number % 6}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def start(
    folder: Path, delay: float = 0.0, *launcher: str, log: Path | None = None
) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "SMALLNET_DELAY": str(delay)}
    environ |= {"SMALLNET_LOG": str(log)} if log else {}
    return subprocess.Popen(
        [sys.executable, *launcher, *COMMAND, str(folder), *OPTIONS],
        env=environ, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[bytes]) -> None:
    _, shown = process.communicate(timeout=240)
    assert process.returncode == 0, shown.decode()


def parts(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.glob(".scores/*/*.parquet")}


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("scores.parquet", "scores.json")]


def test_killed_scores_equal_undisturbed_ones_and_so_do_those_of_two_processes(tmp_path: Path) -> None:
    whole, killed, shared = (write_images(tmp_path / name) for name in ("whole", "killed", "shared"))
    finish(start(whole))
    assert pq.read_table(whole / "scores.parquet")["smallnet"].null_count == 0

    moments, before = random.Random(5), parts(killed)
    for kill in range(KILLS):
        process = start(killed, 0.002)
        while process.poll() is None and len(parts(killed)) < min(3 * kill + 2, 11):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.08))
        assert process.poll() is None, "it ended before it was killed: make it longer"
        process.kill()
        process.wait()
        assert not (killed / "scores.parquet").exists()
        assert before.items() <= parts(killed).items(), "a finished block was scored again"
        before = parts(killed)
    assert before
    finish(start(killed))
    assert contents(killed) == contents(whole)
    assert not (killed / ".scores").exists()

    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    log = tmp_path / "log"
    finish(start(shared, 0.0, *torchrun, "--rdzv-endpoint", "localhost:0", log=log))
    assert contents(shared) == contents(whole)
    assert sorted(map(int, log.read_text().split())) == [COUNT // 2 - 18, COUNT // 2 + 18]  # of 7 blocks
