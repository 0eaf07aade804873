"""The speed bench: what it counts, what it prints, and that all contenders train."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import training


def test_flops_are_two_per_multiply_add() -> None:
    layer = nn.Linear(3, 5)
    assert training.forward_flops(lambda: layer(torch.zeros(7, 3))) == 2 * 7 * 3 * 5
    convolution = nn.Conv2d(2, 4, 3, padding=1)
    assert training.forward_flops(lambda: convolution(torch.zeros(1, 2, 8, 8))) == 2 * 8 * 8 * 4 * 2 * 9
    head = torch.zeros(1, 1, 6, 4)  # six tokens of width 4: scores and weighted sum, 6 x 6 x 4 each
    assert training.forward_flops(lambda: scaled_dot_product_attention(head, head, head)) == 2 * 2 * 6 * 6 * 4


def test_bound_and_shares_by_hand() -> None:
    flops = training.Flops(unet=10e9, vae=18e9, text=4e9)
    assert flops.cached == 80e9  # reference 2 x 1, policy 2 x (1 + 2) forward passes
    assert flops.bound == 1.5  # (80 + 2 x 18 + 4) / 80
    times = {"usual": np.full(3, 1.35), "cached": np.full(3, 1.0), "bare": np.full(3, 0.8)}
    text = training.markdown(times, flops, batch=4, about="here")
    assert "| 4.00 (4.00 to 4.00) | 80 |" in text
    assert "**1.350 (1.350 to 1.350)**; FLOP bound 1.500; share of the bound **0.900**" in text
    assert "overhead over the bare loop: **25.0 (25.0 to 25.0) %**" in text


def test_turns_are_equal_and_steps_are_numbered_in_order() -> None:
    class Counter:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def step(self, number: int) -> None:
            self.seen.append(number)

    contenders = {"a": Counter(), "b": Counter()}
    ticks = iter(range(10_000))
    times, steps = training.race(contenders, rounds=3, seconds=12, clock=lambda: float(next(ticks)))
    assert steps == 2  # a turn takes one tick: 12 / (3 rounds x 2 contenders)
    assert times["a"].tolist() == [0.5, 0.5, 0.5]
    assert contenders["a"].seen == contenders["b"].seen == list(range(2 + 1 + 3 * 2))


def test_all_contenders_train_the_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers.json"
    sizes = ["--count", "8", "--batch", "4", "--rounds", "2", "--seconds", "0", "--threads", "1"]
    assert training.main(["--model", "miniature", *sizes, "--json", str(numbers)]) == 0
    assert "trainer's overhead over the bare loop" in capsys.readouterr().out
    written = json.loads(numbers.read_text())
    assert {name: len(times) for name, times in written["seconds_per_step"].items()} == {
        "usual": 2,
        "bare": 2,
        "cached": 2,
    }
    assert written["bound"] > 1
