"""The CPU benches: what they count, what they print, and that every contender does what its row says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import counting
import racing
import reading
import resuming
import samples
import training
import waiting

from diffpref.config import to_dict
from diffpref.config.loading import parse_train_config
from diffpref.training.checkpoint import Checkpoints

NAMES = ["usual", "text", "latents", "errors", "lora", "bare"]
SMALL = ["--model", "miniature", "--count", "8", "--batch", "4", "--threads", "1"]


def test_flops_are_two_per_multiply_add() -> None:
    layer = nn.Linear(3, 5)
    assert counting.forward_flops(lambda: layer(torch.zeros(7, 3))) == 2 * 7 * 3 * 5
    convolution = nn.Conv2d(2, 4, 3, padding=1)
    assert counting.forward_flops(lambda: convolution(torch.zeros(1, 2, 8, 8))) == 2 * 8 * 8 * 4 * 2 * 9
    head = torch.zeros(1, 1, 6, 4)  # six tokens of width 4: scores and weighted sum, 6 x 6 x 4 each
    assert counting.forward_flops(lambda: scaled_dot_product_attention(head, head, head)) == 2 * 2 * 6 * 6 * 4


def test_a_backward_pass_is_two_forward_passes() -> None:
    layer, inputs = nn.Linear(3, 5), torch.zeros(7, 3, requires_grad=True)
    once = 2 * 7 * 3 * 5
    assert counting.flops_of(lambda: layer(inputs).sum().backward()) == 3 * once
    layer.requires_grad_(False)  # no gradients of weights
    assert counting.flops_of(lambda: layer(inputs).sum().backward()) == 2 * once


def test_flops_of_a_pair_by_hand() -> None:
    flops = counting.Flops(unet=10.0, vae=18.0, text=4.0)
    assert flops.dpo == 80  # reference 2 x 1, policy 2 x (1 + 2) forward passes
    assert flops.without_reference == 60
    assert flops.lora == 60  # reference 2 x 1, policy 2 x (1 + 1)
    assert flops.usual == 80 + 2 * 18 + 4


def test_turns_are_equal_and_steps_are_numbered_in_order() -> None:
    class Counter:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def step(self, number: int) -> None:
            self.seen.append(number)

    contenders = {"a": Counter(), "b": Counter()}
    ticks = iter(range(10_000))
    times, steps = racing.race(contenders, 3, 12, lambda: float(next(ticks)), done=5)
    assert steps == 2  # a turn takes one tick: 12 / (3 rounds x 2 contenders)
    assert times["a"].tolist() == [0.5, 0.5, 0.5]
    assert contenders["a"].seen == contenders["b"].seen == list(range(5, 5 + 2 + 1 + 3 * 2))
    few = {"a": Counter()}
    assert racing.race(few, 3, 1e9, lambda: 0.0, limit=3 + 3 * 4)[1] == 4
    assert len(few["a"].seen) == 3 + 3 * 4


def test_ladder_by_hand() -> None:
    seconds = {"usual": 1.35, "text": 1.2, "latents": 1.0, "errors": 0.75, "lora": 0.9, "bare": 0.8}
    times = {name: np.full(3, value) for name, value in seconds.items()}
    flops = {"usual": 120e9, "text": 116e9, "latents": 80e9, "errors": 60e9, "lora": 60e9, "bare": 80e9}
    text = training.markdown(times, flops, batch=4, notes=["here"])
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(NAMES)
    assert rows[2].endswith("| 4.00 (4.00 to 4.00) | 1.350 (1.350 to 1.350) | 1.500 | 0.900 | 80 |")
    assert rows[3].endswith("| 5.33 (5.33 to 5.33) | 1.800 (1.800 to 1.800) | 2.000 | 0.900 | 60 |")
    assert "default over usual: **0.900** of the ratio of FLOPs" in text
    assert "overhead over the bare loop: **25.0 (25.0 to 25.0) %**" in text
    assert text.endswith("- here")


def test_all_contenders_train_the_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers.json"
    assert training.main([*SMALL, "--rounds", "2", "--seconds", "0", "--json", str(numbers)]) == 0
    shown = capsys.readouterr().out
    assert "trainer's overhead over the bare loop" in shown
    assert all(meaning in shown for meaning in training.MEANINGS.values())
    written = json.loads(numbers.read_text())
    assert {name: len(times) for name, times in written["seconds_per_step"].items()} == dict.fromkeys(
        NAMES, 2
    )
    flops = written["flops_per_pair"]
    assert flops["latents"] == flops["bare"]
    assert flops["errors"] / flops["latents"] == pytest.approx(6 / 8, abs=0.01)
    assert flops["errors"] < flops["lora"] < flops["latents"]  # no gradients of weights, but adapters


def test_what_the_steps_of_the_ladder_save(tmp_path: Path) -> None:
    """Two encoded images a pair between cached text and cached latents, a caption before that."""
    values = training.argparse.Namespace(
        model="miniature", count=8, batch=4, resolution=64, threads=1, precision="no", pairs=""
    )
    setting = training.prepare(values, tmp_path)
    taken = {}
    for name in ("usual", "text", "latents"):
        contender = setting.contender(name)
        taken[name] = counting.flops_of(lambda one=contender: one.step(0)) / 4
    images = torch.zeros(2, 3, 64, 64)
    vae = counting.forward_flops(lambda: setting.family.codec.encode(images))
    text = counting.forward_flops(lambda: setting.family.encode_prompts(["a caption"]))
    assert taken["usual"] - taken["text"] == text
    assert taken["text"] - taken["latents"] == vae


def test_contenders_start_from_the_same_weights_and_change_them(tmp_path: Path) -> None:
    values = training.argparse.Namespace(
        model="miniature", count=8, batch=4, resolution=64, threads=1, precision="no", pairs=""
    )
    setting = training.prepare(values, tmp_path)
    base = {name: value.clone() for name, value in setting.family.unet.state_dict().items()}
    contenders: dict[str, Any] = {name: setting.contender(name) for name in ("bare", "latents", "lora")}
    policies = {"bare": contenders["bare"]._unet, "latents": contenders["latents"]._trainer.unet}
    for name, policy in policies.items():
        assert _equal(policy.state_dict(), base)
        contenders[name].step(0)
        assert not _equal(policy.state_dict(), base)
    contenders["lora"].step(0)
    assert _equal(setting.family.unet.state_dict(), base)  # no contender trains another's weights


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_synthetic_cache_is_read_like_a_real_one(tmp_path: Path) -> None:
    cache = samples.synthetic_cache(tmp_path, 5, 64, (4, 8, 8), {"prompt_embeds": (77, 3)})
    assert len(cache) == 5
    found = cache.latents([3, 1])
    assert found.mean.shape == found.logvar.shape == (2, 2, 4, 8, 8)
    assert found.size == (64, 64)
    assert torch.equal(found.original, torch.full((2, 2, 2), 64))
    assert cache.captions([3, 1]).tolist() == [[4, 4], [2, 2]]  # 0 is the empty prompt
    assert cache.conditioning([4, 2])["prompt_embeds"].shape == (2, 77, 3)
    assert not torch.equal(found.mean[0], found.mean[1])


def test_reader_against_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers.json"
    small = [
        "--side",
        "64",
        "--image",
        "96",
        "--pairs",
        "8",
        "--batch",
        "4",
        "--rounds",
        "2",
        "--seconds",
        "0",
    ]
    assert reading.main([*small, "--json", str(numbers)]) == 0
    shown = capsys.readouterr().out
    assert "| JPEGs: decode, resize, tensor |" in shown
    assert "images 96 px trained at 64" in shown
    written = json.loads(numbers.read_text())["seconds_per_batch"]
    assert {name: len(times) for name, times in written.items()} == {"decode": 2, "cached": 2}


def test_reading_by_hand() -> None:
    text = reading.markdown({"decode": np.full(3, 2.0), "cached": np.full(3, 0.05)}, batch=16, about="here")
    assert "| the latent cache | 320 (320 to 320) |" in text
    assert "cache / JPEGs: **40.0 (40.0 to 40.0)**" in text


def _resumable(tmp_path: Path) -> Any:
    values = resuming.argparse.Namespace(
        model="miniature", pairs="", count=8, batch=4, step=500, reference="auto", threads=1
    )
    return resuming.make_config(values, tmp_path)


def test_a_run_is_resumed_where_it_is_said_to_be(tmp_path: Path) -> None:
    config = _resumable(tmp_path)
    resuming.make_resumable(config, 500)
    folder = Path(config.output)
    checkpoint = Checkpoints(folder / "checkpoints").latest()
    assert checkpoint is not None
    assert checkpoint.step == checkpoint.state()["step"] == 500
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, *range(10, 501, 10)]
    counters = [value for name, value in checkpoint.tensors("optimizer").items() if name.startswith("step/")]
    assert counters
    assert all(value == 500 for value in counters)
    first, seconds, further = resuming.first_step(config)
    assert first == 501
    assert seconds > further > 0  # of the whole start, not of the step alone
    elsewhere = parse_train_config(to_dict(config), {"output": str(tmp_path / "fresh")})
    assert resuming.first_step(elsewhere)[0] == 1


def test_resuming_prints_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers.json"
    assert resuming.main([*SMALL, "--rounds", "1", "--step", "200", "--json", str(numbers)]) == 0
    shown = capsys.readouterr().out
    assert "| resumed at step 200 |" in shown
    assert "resumed / begun: **" in shown
    assert {
        name: len(times) for name, times in json.loads(numbers.read_text())["seconds_to_first_step"].items()
    } == {
        "begun": 1,
        "resumed": 1,
    }


def test_the_table_of_waits_has_speeds_and_their_ratios_by_hand():
    """64 pairs in 1 s and in 2 s; beside a neighbour in 4 s."""
    quiet = {"300000": np.array([1.0, 1.0, 1.0]), "1000": np.array([2.0, 2.0, 2.0])}
    beside = {name: np.array([4.0, 4.0, 4.0]) for name in quiet}
    first, second = waiting.markdown(quiet, beside).splitlines()[2:]
    assert first.split(" | ")[1:] == [
        "64.0 (64.0 to 64.0)", "1.000 (1.000 to 1.000)", "16.0 (16.0 to 16.0)", "0.25 |",
    ]  # fmt: skip
    assert second.split(" | ")[1:] == [
        "32.0 (32.0 to 32.0)", "0.500 (0.500 to 0.500)", "16.0 (16.0 to 16.0)", "0.50 |",
    ]  # fmt: skip
