"""bench/evaluators.py: each reference loop gives our scores; a bench of two different things is refused."""

from __future__ import annotations

import importlib.util
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import counting
import evaluators
from evaluator_contests import (
    CONTESTS,
    SAME,
    TOO_LARGE,
    Contest,
    Setting,
    caption,
    distinct,
    geneval_prompt,
    repeated,
)
from evaluator_models import SIZES, make_clip, make_detector, make_image_reward

from diffpref.errors import UserError
from diffpref.evaluators import EVALUATORS
from diffpref.evaluators.geneval.grammar import parse_prompt
from diffpref.evaluators.geneval.words import KINDS
from tests.parity.inside import needs_torchvision, run_with_torchvision

SMALL = ["--size", "small", "--side", "96", "--group", "3", "--rounds", "1", "--threads", "1"]
VALUES = Namespace(size="small", device="cpu", dtype="fp32", batch=32, side=96, pairs=3, group=3)
NUMBER = r"\d+\.\d+ \(\d+\.\d+ to \d+\.\d+\)"


def rows(shown: str) -> dict[tuple[str, str], str]:
    """Lines of the table by evaluator and workload."""
    cells = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")][2:]
    return {(line[0].removeprefix("| "), line[1]): " | ".join(line[2:]) for line in cells}


def test_every_evaluator_takes_part_or_is_said_not_to() -> None:
    assert {*CONTESTS, *SAME, *TOO_LARGE} == set(EVALUATORS)
    assert set(SAME.values()) <= set(CONTESTS)


def test_all_but_the_slowest_are_measured_on_both_workloads(capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in CONTESTS if name not in ("geneval", "hps-v2")]
    assert evaluators.main([*SMALL, "--pairs", "3", "--evaluators", *names]) == 0
    shown = capsys.readouterr().out
    found = rows(shown)
    assert list(found) == [(name, kind) for name in names for kind in ("distinct", "repeated")]
    for (name, _), line in found.items():
        form = rf"{NUMBER} \| none \|  \|" if name == "oracle" else rf"{NUMBER} \| {NUMBER} \| {NUMBER} \|"
        assert re.fullmatch(form, line), line
    assert "image tower of pickscore: " in shown
    assert "hps-v2.1 has the network and the loop of hps-v2" in shown
    assert "hps-v3 is too large to take part" in shown


def test_geneval_finds_objects_and_colours(capsys: pytest.CaptureFixture[str]) -> None:
    """Else the bench ends with an error."""
    arguments = ["--pairs", "1", "--workloads", "distinct", "--evaluators", "geneval"]
    assert evaluators.main([*SMALL, *arguments]) == 0
    assert list(rows(capsys.readouterr().out)) == [("geneval", "distinct")]


@needs_torchvision
def test_hps_is_measured_where_torchvision_is() -> None:
    shown = run_with_torchvision(evaluators.__file__, *SMALL, "--pairs", "3", "--evaluators", "hps-v2")
    assert list(rows(shown)) == [("hps-v2", "distinct"), ("hps-v2", "repeated")]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_what_cannot_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluators.main([*SMALL, "--pairs", "1", "--evaluators", "hps-v2", "oracle"]) == 0
    shown = capsys.readouterr().out
    assert "**hps-v2 is left out**" in shown
    assert ("oracle", "distinct") in rows(shown)


@pytest.fixture(scope="module")
def contest() -> Contest:
    return CONTESTS["clipscore"](Setting(VALUES))


@pytest.mark.parametrize("name", ["pickscore", "aesthetic", "image-reward", "geneval"])
def test_both_sides_run_one_network_that_nobody_hashes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the published sizes a copy is gigabytes, and a hash takes longer than the bench."""

    def hashed(module: torch.nn.Module) -> str:
        raise AssertionError(type(module))

    for place in ("hf_clip", "open_clip_models", "image_reward", "aesthetic", "geneval.detector"):
        monkeypatch.setattr(f"diffpref.evaluators.{place}.weights_hash", hashed)
    setting = Setting(VALUES)
    contest: Any = CONTESTS[name](setting)
    if name == "image-reward":
        assert contest.loop.network is contest.evaluator.network
        return
    assert contest.clip.network is setting.clip.network
    if name == "geneval":
        assert contest.loop.model is contest.evaluator.finder.model
    assert (contest.loop.clip if name == "geneval" else contest.loop).model is setting.parts[0]


@pytest.mark.parametrize("make", [make_clip, make_image_reward, make_detector])
def test_networks_are_made_on_the_device_that_they_run_on(make: Callable[..., Any]) -> None:
    made = make(SIZES["small"], "meta")
    network = made[0] if isinstance(made, tuple) else made
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_a_loop_that_computes_something_else_is_refused(contest: Contest) -> None:
    loop: Callable[..., np.ndarray] = contest.loop  # type: ignore[assignment]
    pairs = distinct(contest, VALUES)
    evaluators.check(contest, pairs, VALUES)
    with pytest.raises(UserError, match="compute different things"):
        evaluators.check(replace(contest, loop=lambda pairs: loop(pairs) + 3e-5), pairs, VALUES)
    with pytest.raises(UserError, match="scores all images"):
        evaluators.check(contest, [pairs[0][:1] * 2 + pairs[0][2:]] * 3, VALUES)


def test_a_turn_starts_with_nothing_remembered(contest: Contest) -> None:
    assert contest.clip is not None
    pairs = repeated(contest, VALUES)
    contest.ours(pairs, 32)
    known = contest.clip.network.known
    assert len(known) == 3 + 1  # three images make three pairs with one prompt
    sizes = []
    replace(contest, forget=lambda: sizes.append(len(known))).ours(pairs, 32)
    assert sizes == [0]


def test_workloads_repeat_images_or_do_not(contest: Contest) -> None:
    def images(pairs: list) -> list[bytes]:  # type: ignore[type-arg]
        return [image.tobytes() for pair in pairs for image in pair[:2]]

    values = Namespace(**{**vars(VALUES), "pairs": 6})
    new, again = distinct(contest, values), repeated(contest, values)
    assert (len(images(new)), len(set(images(new)))) == (12, 12)
    assert len({prompt for *_, prompt in new}) == 6
    assert (len(images(again)), len(set(images(again)))) == (12, 6)
    assert [prompt for *_, prompt in again] == [caption(0)] * 3 + [caption(1)] * 3


def test_flops_of_a_fused_attention_layer_are_counted() -> None:
    """open_clip's, whose fused form no counter sees into."""
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)
    tokens = torch.zeros(1, 5, 8)
    with torch.inference_mode():
        counted = counting.flops_of(lambda: layer(tokens, tokens, tokens, need_weights=False))
    assert counted == 2 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)  # four projections; scores and weighted sum
    assert torch.backends.mha.get_fastpath_enabled()


def test_prompts_of_the_bench_are_of_all_of_genevals_tasks() -> None:
    assert {parse_prompt(geneval_prompt(number)).kind for number in range(6)} == set(KINDS)
