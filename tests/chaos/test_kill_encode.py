"""`kill -9` of `diffpref encode` at random moments: the bytes are those of a cache never killed, and a
finished file is never made again. Processes are forked from this one, which spares them the imports."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import time

import pytest
from tqdm import tqdm

from diffpref.data import cache_parts
from diffpref.families.miniature import stable_diffusion
from tests.miniatures import config, rows, write_config, write_pairs

PAIRS = 360


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(folder, *options): a process that encodes into it, in files of 4 pairs and 3 captions."""
    monkeypatch.setattr(cache_parts, "SHARD_PAIRS", 4)
    monkeypatch.setattr(cache_parts, "SHARD_CAPTIONS", 3)
    table = rows(PAIRS)
    for number, row in enumerate(table):
        row["caption"] = f"{row['caption']} {number % 100}"
    table[77]["jpg_1"] = b"no image"
    pairs = write_pairs(tmp_path / "pairs.parquet", table)
    tree = config(stable_diffusion(tmp_path / "model"), pairs, tmp_path / "run")
    path = write_config(tmp_path / "c.toml", tree)

    def run(folder, *options):
        arguments = ["encode", str(path), "--data.cache_dir", str(folder), *options]
        process = multiprocessing.get_context("fork").Process(target=encode, args=(arguments,))
        process.start()
        while process.is_alive() and os.getpgid(process.pid) != process.pid:
            time.sleep(0.01)  # until it has a group of its own, which can be killed as a whole
        return process

    return run


def encode(arguments):
    from diffpref.cli import main

    os.setsid()
    tqdm.set_lock(threading.RLock())  # its own is shared by forked processes, and one is killed that holds it
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    logging.getLogger().handlers.clear()
    sys.exit(main(arguments))


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
    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    moments, folder = random.Random(112), tmp_path / "killed"
    before, done, left_staged, began = {}, 0, 0, 0
    while done < kills:
        process = start(folder, *options)
        goal = len(before) + moments.randint(0, 4)
        while process.is_alive() and (len(shards(folder)) < goal or not (folder / "train").exists()):
            time.sleep(0.01)  # looking takes time that the others need
        time.sleep(moments.uniform(0.0, 0.1))
        if not process.is_alive():
            break
        if "ray" in options:  # whose own processes notice the end of the command
            process.kill()
        else:  # with its workers, which would clean up after it
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        done += 1
        left_staged += any(path.name.endswith(".tmp") for path in folder.rglob(".*"))
        now = shards(folder)
        assert before.items() <= now.items(), "a finished file was made again"
        before, began = now, began + bool(now)
    assert done == kills, f"the cache was complete after {done} kills: give it more pairs"
    assert left_staged, "no kill hit a file that was being written"
    assert began >= kills // 2
    last = start(folder, *options)
    last.join()
    assert last.exitcode == 0
    assert before.items() <= shards(folder).items()
    assert contents(folder) == contents(tmp_path / "whole")
