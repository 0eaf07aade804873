"""`kill -9` of `diffpref score` at random moments, and two processes of it: the bytes are those of one
process that was never disturbed."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tests import evaluators, forked
from tests.forked import Forked

COUNT = 420
KILLS = 2
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


def start(folder: Path, delay: float = 0.0) -> Forked:
    log = folder.with_suffix(".log")
    return forked.start(log, "score", folder, *OPTIONS, main=evaluators.main, SMALLNET_DELAY=str(delay))


def parts(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.glob(".scores/*/*.parquet")}


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("scores.parquet", "scores.json")]


def test_killed_scores_equal_undisturbed_ones_and_so_do_those_of_two_processes(tmp_path: Path) -> None:
    whole, killed, shared = (write_images(tmp_path / name) for name in ("whole", "killed", "shared"))
    start(whole).finish()
    assert pq.read_table(whole / "scores.parquet")["smallnet"].null_count == 0

    moments, before = random.Random(5), parts(killed)
    for kill in range(KILLS):
        process = start(killed, 0.002)
        while process.running() and len(parts(killed)) < min(3 * kill + 2, 11):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.08))
        assert process.running(), "it ended before it was killed: make it longer"
        process.kill()
        assert not (killed / "scores.parquet").exists()
        assert before.items() <= parts(killed).items(), "a finished block was scored again"
        before = parts(killed)
    assert before
    start(killed).finish()
    assert contents(killed) == contents(whole)
    assert not (killed / ".scores").exists()

    log = tmp_path / "log"
    words = ("score", shared, *OPTIONS)
    for one in forked.launch(2, tmp_path / "two", *words, main=evaluators.main, SMALLNET_LOG=str(log)):
        one.finish()
    assert contents(shared) == contents(whole)
    assert sorted(map(int, log.read_text().split())) == [COUNT // 2 - 18, COUNT // 2 + 18]  # of 7 blocks
