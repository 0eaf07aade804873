"""Two real processes (gloo on the CPU) against one, and the launch that only looks like two."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from diffpref.families.miniature import stable_diffusion
from tests import forked
from tests.miniatures import config, diffpref_here, environment, metrics, rows, write_config, write_pairs

CHANGES = {"train__steps": 4, "train__micro_batch": 1, "data__prompt_dropout": 0.2, "validation__pairs": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    stable_diffusion(folder / "model")
    write_pairs(
        folder / "pairs.parquet", rows(300, sizes=((32, 32), (32, 32), (24, 48), (26, 50)))
    )  # two shards of the cache: each process makes one
    write_pairs(folder / "held.parquet", rows(4, first=400))
    return folder


def write(world, tmp_path, name, **changes):
    changes = CHANGES | {"data__validation": str(world / "held.parquet")} | changes
    tree = config(world / "model", world / "pairs.parquet", tmp_path / name, **changes)
    return write_config(tmp_path / f"{name}.toml", tree)


def two_processes(path, **environ):
    """Their exit codes, and what they printed."""
    processes = forked.launch(2, path.with_suffix(".log"), "train", path, **environ)
    codes = [process.wait() for process in processes]
    return codes, "\n".join(process.printed() for process in processes)


def torchrun(path):
    """The same by the launcher itself."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "-m", "diffpref", "train", str(path),
    ]  # fmt: skip
    environ = environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300, check=False)
    return [done.returncode] * 2, done.stderr


# what accelerate launch sets for fsdp2.yaml and deepspeed-zero2.yaml
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
KEPT = {"FSDP_RESHARD_AFTER_FORWARD": "false"}  # fsdp2-zero2.yaml
ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
with_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


@pytest.mark.parametrize(
    ("launch", "changes"),
    [
        ({}, {}),
        ({}, {"adapter__type": "lora"}),
        ({}, {"data__aspect": "buckets", "reference__kind": "cached", "train__ema_decay": 0.9}),
        (FSDP2, {"train__ema_decay": 0.9, "sampling__count": 2, "sampling__steps": 2}),
        (
            FSDP2,
            {"adapter__type": "lora", "reference__kind": "cached", "model__gradient_checkpointing": True},
        ),
        (
            FSDP2 | KEPT,
            {"train__ema_decay": 0.9, "validation__every": 1, "sampling__count": 2, "sampling__steps": 2},
        ),
        pytest.param(ZERO2, {"train__ema_decay": 0.9}, marks=with_deepspeed),
        pytest.param(ZERO2, {"adapter__type": "lora"}, marks=with_deepspeed),
    ],
)
def test_two_processes_train_what_one_trains(world, tmp_path, launch, changes):
    code, printed = diffpref_here("train", write(world, tmp_path, "one", **changes))
    assert code == 0, printed
    path = write(world, tmp_path, "two", **changes)
    codes, printed = two_processes(path, **launch) if launch or changes else torchrun(path)
    assert codes == [0, 0], printed
    strategy = json.loads((tmp_path / "two/manifest.json").read_text())["strategy"]
    assert strategy == ("fsdp2" if "FSDP_VERSION" in launch else "zero2" if launch is ZERO2 else "replicated")
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        a, b = a.get("validation", a), b.get("validation", b)
        assert a.keys() == b.keys()
        for name, value in a.items():
            # sums in another order; the sign of a margin near 0 may turn, one of twelve
            absolute = 0.09 if name.endswith("accuracy") else 1e-5
            # the loss has the rounding of the errors times beta
            relative = 1e-4 if name in ("grad_norm", "loss") else 1e-5
            assert value == pytest.approx(b[name], rel=relative, abs=absolute), name
    weights = [
        load_file(tmp_path / name / "checkpoints/step-4/weights.safetensors") for name in ("one", "two")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert (value - weights[1][name]).abs().max() < 1e-4
    exports = [
        sorted(path.name for path in (tmp_path / name / "model").rglob("*")) for name in ("one", "two")
    ]
    assert exports[0] == exports[1]
    for file in (tmp_path / "one/model").rglob("*weights.safetensors"):
        other = load_file(tmp_path / "two" / file.relative_to(tmp_path / "one"))
        for name, value in load_file(file).items():
            assert (value - other[name]).abs().max() < 1e-4


@pytest.mark.parametrize("launch", [FSDP2 | KEPT, pytest.param(ZERO2, marks=with_deepspeed)])
def test_a_sharded_run_resumes_to_the_same_bits(world, tmp_path, launch):
    """Shortened, then made longer: weights, moments and averages come back to the slices they were in."""
    changes = {
        "train__ema_decay": 0.9, "checkpoint__every": 0, "sampling__count": 2, "sampling__steps": 2,
        "validation__pairs": 1,
    }  # fmt: skip
    for name, steps in (("run", 2), ("run", 4), ("whole", 4)):
        path = write(world, tmp_path, name, **changes | {"train__steps": steps})
        codes, printed = two_processes(path, **launch)
        assert codes == [0, 0], printed
    for name in ("weights", "optimizer", "average"):
        file = f"checkpoints/step-4/{name}.safetensors"
        a, b = load_file(tmp_path / "run" / file), load_file(tmp_path / "whole" / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("environ", "changes", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP version 1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "zero_stage: 3"),
        (FSDP2, {"train__optimizer": "adafactor"}, "does not work with FSDP"),
        (FSDP2, {"train__micro_batch": "auto"}, "does not work with FSDP"),
    ],
)
def test_launches_that_cannot_work_are_refused(world, tmp_path, monkeypatch, environ, changes, message):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    code, printed = diffpref_here("train", write(world, tmp_path, "run", **changes))
    assert code == 2, printed
    assert message in printed
    assert not (tmp_path / "run").exists()


def test_another_number_of_processes_cannot_resume(world, tmp_path):
    path = write(world, tmp_path, "run", data__validation="", train__steps=2)
    assert diffpref_here("train", path)[0] == 0
    path = write(world, tmp_path, "run", data__validation="", train__steps=4)
    codes, printed = two_processes(path)
    assert codes == [2, 2]
    assert "was trained by 1 process(es), now there are 2" in printed
    assert os.listdir(tmp_path / "run/checkpoints") == ["step-2"]


@pytest.mark.slow
def test_all_processes_follow_what_the_main_one_finds(world, tmp_path):
    path = write(world, tmp_path, "run", data__validation="", train__steps=4, checkpoint__every=2)
    assert two_processes(path)[0] == [0, 0]
    whole = load_file(tmp_path / "run/checkpoints/step-4/weights.safetensors")
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "step-4/manifest.json").unlink()
    codes, printed = two_processes(path)
    assert codes == [0, 0]
    assert printed.count("step-4 is damaged (manifest.json is missing): passed over") == 1
    assert sorted(os.listdir(checkpoints)) == ["damaged-step-4", "step-2", "step-4"]
    again = load_file(checkpoints / "step-4/weights.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    for step in (2, 4):
        (checkpoints / f"step-{step}/state.json").unlink()
    codes, printed = two_processes(path)
    assert codes == [2, 2]
    assert "step-4: state.json is missing; step-2: state.json is missing" in printed
    assert sorted(os.listdir(checkpoints)) == ["damaged-step-4", "step-2", "step-4"]


def test_processes_that_do_not_find_one_another_are_refused(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, printed = diffpref_here("train", write(world, tmp_path, "run"))
    assert code == 2, printed
    assert "WORLD_SIZE is 2" in printed
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_is_refused(world, tmp_path):
    codes, printed = two_processes(write(world, tmp_path, "run", train__batch_size=5, train__micro_batch=0))
    assert codes == [2, 2]
    assert "does not divide over 2 processes" in printed
    assert not (tmp_path / "run").exists()
