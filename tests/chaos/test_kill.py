"""`kill -9` at random moments, saves included: resuming ends in the bits of the run that was never killed."""

from __future__ import annotations

import random
import time

import torch
from safetensors.torch import load_file

from diffpref.families.miniature import stable_diffusion
from tests.forked import start
from tests.miniatures import config, metrics, rows, write_config, write_pairs

KILLS = 10
STEPS = 60
CHANGES = {
    "train__steps": STEPS, "train__batch_size": 2, "train__ema_decay": 0.9, "log__every": 7,
    "checkpoint__every": 1, "checkpoint__keep": 1, "data__prompt_dropout": 0.1,
}  # fmt: skip


def test_killed_ten_times_equals_never_killed(tmp_path):
    model = stable_diffusion(tmp_path / "model")
    pairs = write_pairs(tmp_path / "pairs.parquet", rows(300))
    tree = config(model, pairs, tmp_path / "whole", **CHANGES)
    start(tmp_path / "log", "train", write_config(tmp_path / "whole.toml", tree)).finish()
    path = write_config(tmp_path / "killed.toml", config(model, pairs, tmp_path / "killed", **CHANGES))
    moments = random.Random(20)
    folder, kills, reached = tmp_path / "killed", 0, 0
    while kills < KILLS:
        run = start(tmp_path / "log", "train", path)
        # the first kills hit the cache, the others the steps and their saves, which take most of the time
        # here
        if kills < 2:
            before = files(folder / "cache")
            wait(run, lambda before=before: files(folder / "cache") != before)
        else:
            goal = last_step(folder) + moments.randint(1, 4)
            wait(run, lambda goal=goal: last_step(folder) >= goal)
        time.sleep(moments.uniform(0.0, 0.1))
        if not run.running():
            break
        run.kill()
        kills += 1
        reached = max(reached, last_step(folder))
    assert kills >= 8, f"the run ended after {kills} kills: make it longer"
    assert reached >= 8
    start(tmp_path / "log", "train", path).finish()
    assert metrics(folder) == metrics(tmp_path / "whole")
    for file in (
        "model/unet/diffusion_pytorch_model.safetensors",
        f"checkpoints/step-{STEPS}/weights.safetensors",
        f"checkpoints/step-{STEPS}/optimizer.safetensors",
        f"checkpoints/step-{STEPS}/average.safetensors",
    ):
        ours, theirs = load_file(folder / file), load_file(tmp_path / "whole" / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step-{STEPS}"]


def wait(run, condition):
    while run.running() and not condition():
        time.sleep(0.001)


def files(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def last_step(folder):
    return max((int(path.name[5:]) for path in folder.glob("checkpoints/step-*")), default=0)
