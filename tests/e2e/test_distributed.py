"""Two real processes (gloo on the CPU) against one, and the launch that only looks like two."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from diffpref.families.miniature import stable_diffusion
from tests.miniatures import config, diffpref, environment, metrics, rows, write_config, write_pairs

CHANGES = {"train__steps": 4, "train__micro_batch": 1, "data__prompt_dropout": 0.2, "validation__pairs": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    stable_diffusion(folder / "model")
    write_pairs(folder / "pairs.parquet", rows(300))  # two shards of the cache: each process makes one
    write_pairs(folder / "held.parquet", rows(4, first=400))
    return folder


def write(world, tmp_path, name, **changes):
    changes = CHANGES | {"data__validation": str(world / "held.parquet")} | changes
    tree = config(world / "model", world / "pairs.parquet", tmp_path / name, **changes)
    return write_config(tmp_path / f"{name}.toml", tree)


def two_processes(path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "-m", "diffpref", "train", str(path),
    ]  # fmt: skip
    environ = environment(ACCELERATE_USE_CPU="true")
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300, check=False)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_two_processes_train_what_one_trains(world, tmp_path, adapter):
    one = diffpref("train", write(world, tmp_path, "one", adapter__type=adapter))
    assert one.returncode == 0, one.stderr
    two = two_processes(write(world, tmp_path, "two", adapter__type=adapter))
    assert two.returncode == 0, two.stderr
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        a, b = a.get("validation", a), b.get("validation", b)
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value == pytest.approx(b[name], rel=1e-4 if name == "grad_norm" else 1e-5, abs=1e-5), name
    weights = [
        load_file(tmp_path / name / "checkpoints/step-4/weights.safetensors") for name in ("one", "two")
    ]
    for name, value in weights[0].items():
        assert (value - weights[1][name]).abs().max() < 1e-4


def test_another_number_of_processes_cannot_resume(world, tmp_path):
    path = write(world, tmp_path, "run", data__validation="", train__steps=2)
    assert diffpref("train", path).returncode == 0
    path = write(world, tmp_path, "run", data__validation="", train__steps=4)
    refused = two_processes(path)
    assert refused.returncode != 0
    assert "was trained by 1 process(es), now there are 2" in refused.stderr
    assert os.listdir(tmp_path / "run/checkpoints") == ["step-2"]


def test_processes_that_do_not_find_one_another_are_refused(world, tmp_path):
    done = diffpref("train", write(world, tmp_path, "run"), WORLD_SIZE="2")
    assert done.returncode == 2, done.stderr
    assert "WORLD_SIZE is 2" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_is_refused(world, tmp_path):
    done = two_processes(write(world, tmp_path, "run", train__batch_size=5, train__micro_batch=0))
    assert done.returncode != 0
    assert "does not divide over 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()
