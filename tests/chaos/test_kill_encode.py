"""`kill -9` of `diffpref encode` at random moments: the bytes are those of a cache never killed, and a
finished file is never made again."""

from __future__ import annotations

import random
import time

import pytest

from diffpref import cli
from diffpref.data import cache_parts
from diffpref.families.miniature import stable_diffusion
from tests import forked
from tests.miniatures import config, rows, write_config, write_pairs

PAIRS = 360


def encode(arguments):
    """In files of 4 pairs and 3 captions."""
    cache_parts.SHARD_PAIRS, cache_parts.SHARD_CAPTIONS = 4, 3
    return cli.main(arguments)


@pytest.fixture
def start(tmp_path):
    """start(folder, *options): a process that encodes into it."""
    table = rows(PAIRS)
    for number, row in enumerate(table):
        row["caption"] = f"{row['caption']} {number % 100}"
    table[77]["jpg_1"] = b"no image"
    pairs = write_pairs(tmp_path / "pairs.parquet", table)
    tree = config(stable_diffusion(tmp_path / "model"), pairs, tmp_path / "run")
    path = write_config(tmp_path / "c.toml", tree)

    def run(folder, *options):
        words = ["encode", path, "--data.cache_dir", folder, *options]
        return forked.start(tmp_path / "log", *words, main=encode)

    return run


def shards(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("0*.safetensors")
    }


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("options", "kills"), [
    ((), 10),
    pytest.param(("--workers", "2"), 4, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    pytest.param(
        ("--engine", "ray", "--workers", "2"), 10, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]
    ),
], ids=["one", "workers", "ray"])  # fmt: skip
def test_killed_at_random_moments_equals_never_killed(start, tmp_path, options, kills):
    start(tmp_path / "whole").finish()
    moments, folder = random.Random(112), tmp_path / "killed"
    before, done, left_staged, began = {}, 0, 0, 0
    while done < kills:
        process = start(folder, *options)
        goal = len(before) + moments.randint(0, 4)
        while process.running() and (len(shards(folder)) < goal or not (folder / "train").exists()):
            time.sleep(0.01)  # looking takes time that the others need
        time.sleep(moments.uniform(0.0, 0.1))
        if not process.running():
            break
        process.kill(alone="ray" in options)  # Ray's own processes notice the end of the command
        done += 1
        left_staged += any(path.name.endswith(".tmp") for path in folder.rglob(".*"))
        now = shards(folder)
        assert before.items() <= now.items(), "a finished file was made again"
        before, began = now, began + bool(now)
    assert done == kills, f"the cache was complete after {done} kills: give it more pairs"
    assert left_staged, "no kill hit a file that was being written"
    assert began >= kills // 2
    start(folder, *options).finish()
    assert before.items() <= shards(folder).items()
    assert contents(folder) == contents(tmp_path / "whole")
