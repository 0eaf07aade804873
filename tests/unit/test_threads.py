"""How torch's threads wait and how many they are: the user's environment decides, then diffpref."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from diffpref.config import load_train_config
from diffpref.paths import share_dir
from diffpref.training.setup import set_numerics

UNSET = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def env_command(**extra: str) -> subprocess.CompletedProcess[str]:
    """`diffpref env`, where libgomp itself tells what it read when it was loaded."""
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    return subprocess.run(
        [sys.executable, "-m", "diffpref", "env"],
        env={**kept, "OMP_DISPLAY_ENV": "verbose", **extra},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def read_by_libgomp(done: subprocess.CompletedProcess[str]) -> str:
    found = re.search(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    if not found:
        pytest.skip("torch's threads here are not libgomp's")
    return found.group(1)


def test_waiting_threads_sleep_early_and_env_says_whose_choice_it_is():
    done = env_command()
    assert re.search(r"GOMP_SPINCOUNT +1000 \(diffpref's choice\)\n", done.stdout)
    assert read_by_libgomp(done) == "1000"


def test_a_spin_count_of_the_user_stays():
    done = env_command(GOMP_SPINCOUNT="77")
    assert re.search(r"GOMP_SPINCOUNT +77\n", done.stdout)
    assert read_by_libgomp(done) == "77"


def test_a_wait_policy_of_the_user_stays():
    done = env_command(OMP_WAIT_POLICY="PASSIVE")
    assert re.search(r"GOMP_SPINCOUNT +\(unset\)\n", done.stdout)
    assert read_by_libgomp(done) == "0"  # what PASSIVE means


@pytest.mark.parametrize(
    ("environment", "wanted", "threads"),
    [
        ("1", "2", 1), ("8", "2", 2), ("1,4", "2", 1), (None, "2", 2), ("", "3", 3), ("junk", "2", 2),
        ("1", "0", 4),
    ],
)  # fmt: skip
def test_a_recipe_takes_no_more_threads_than_the_environment_allows(
    monkeypatch, environment, wanted, threads
):
    """4 are set before: what train.threads = 0 leaves alone."""
    if environment is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    config = load_train_config(share_dir("configs") / "train" / "demo-dpo.toml", [("train.threads", wanted)])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        set_numerics(config)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
