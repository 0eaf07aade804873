from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffpref.accuracy import protocol
from diffpref.accuracy.pairs import LabelledPairs, columns_of
from diffpref.accuracy.reward import ImplicitReward
from diffpref.cli import main
from diffpref.evaluators import EVALUATORS, stats
from diffpref.families.miniature import stable_diffusion
from tests.miniatures import config, diffpref_here, metrics, rows, write_config, write_pairs
from tests.pair_files import image_bytes
from tests.unit.test_scoring import Brightness


def test_points_by_hand() -> None:
    labels = np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0])
    preferences = np.array([0.3, 0.1, -0.3, 0.1, 0.3, -0.2, 0.2])
    # at threshold 0.1: 0, tie, 1, tie, 0, 1, 0 are predicted
    assert protocol.points(labels, preferences, 0.1).tolist() == [1, 0.5, 0, 1, 0.5, 1, 0]
    assert protocol.points(labels, preferences, 0.0).tolist() == [1, 1, 0, 0.5, 0.5, 1, 0]
    assert protocol.points(labels, preferences, 1.0).tolist() == [0.5, 0.5, 0.5, 1, 1, 0.5, 0.5]


def test_the_protocol_is_that_of_the_published_formulas() -> None:
    """Softmax, threshold and points as the paper says them, one pair at a time."""
    generator = np.random.default_rng(0)
    scores = generator.normal(20, 1.5, (400, 2))
    labels = generator.choice([0.0, 0.5, 1.0], 400, p=[0.4, 0.15, 0.45])

    def plain(threshold: float) -> float:
        total = 0.0
        for (first, second), label in zip(scores, labels, strict=True):
            p_0, p_1 = np.exp([first, second]) / np.exp([first, second]).sum()
            predicted = "tie" if abs(p_0 - p_1) <= threshold else "0" if p_0 > p_1 else "1"
            wanted = {1.0: "0", 0.0: "1", 0.5: "tie"}[label]
            total += 1.0 if predicted == wanted else 0.5 if "tie" in (predicted, wanted) else 0.0
        return total / len(labels)

    preferences = protocol.preference(scores)
    curve = [plain(step / 10) for step in range(11)]
    for threshold, expected in zip(protocol.THRESHOLDS, curve, strict=True):
        assert protocol.points(labels, preferences, threshold).mean() == pytest.approx(expected, abs=1e-12)
    assert protocol.choose_threshold(labels, preferences) == int(np.argmax(curve)) / 10
    # ten times the scale is ten times the scores
    assert protocol.preference(scores, 10.0) == pytest.approx(protocol.preference(10 * scores))


def test_intervals_resample_prompts_with_all_their_pairs() -> None:
    labels = np.array([1.0] * 6 + [0.5])
    scores = np.array([[2.0, 1], [2, 1], [1, 2], [2, 1], [1, 1], [1, 2], [1, 1]])
    found = protocol.summarise(labels, scores, list("aabbbcd"), 0.0)
    decided = found["decided"]
    assert decided["accuracy"] == pytest.approx((3 + 0.5) / 6)
    assert (decided["pairs"], decided["prompts"], found["ties"], found["equal_scores"]) == (6, 3, 1, 2)
    assert decided["interval"] == pytest.approx(stats.bootstrap_ratios([2.0, 1.5, 0], [2.0, 3, 1]))
    assert decided["wilson"] == pytest.approx(list(stats.wilson_interval(3.5 / 6, 6)))
    assert found["with_ties"]["accuracy"] == pytest.approx((3.5 + 1) / 7)
    assert found["with_ties_by_threshold"]["1"] == pytest.approx((6 * 0.5 + 1) / 7)


def grey(level: int) -> bytes:
    return image_bytes((level, level, level))


def pairs_file(path: Path, levels: list[tuple[int, int]], labels: list[float], **columns: Any) -> Path:
    table = [
        {
            "caption": f"prompt {number // 2}",
            "jpg_0": grey(first) if first >= 0 else b"damaged",
            "jpg_1": grey(second),
            "label_0": label,
        }
        for number, ((first, second), label) in enumerate(zip(levels, labels, strict=True))
    ]
    return write_pairs(path, [{**row, **columns} for row in table])


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVALUATORS, "brightness", lambda _: Brightness())  # lower is better


def test_accuracy_of_an_evaluator_on_pairs_with_ties(
    tmp_path: Path, brightness: None, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = [(10, 200), (10, 200), (50, 50), (90, 100), (7, 8), (200, 10)]
    pairs = pairs_file(tmp_path / "test.parquet", levels, [1, 0, 1, 0.5, 0.5, 0])
    out = tmp_path / "out" / "accuracy.json"
    command = ["accuracy", "--evaluator", "brightness", "--pairs", str(pairs), "--out", str(out)]
    assert main(command) == 0
    found = json.loads(out.read_text())
    # darker is better: right, wrong, equal (1/2), right
    assert found["decided"]["accuracy"] == pytest.approx(2.5 / 4)
    assert (found["pairs"], found["ties"], found["prompts"]) == (6, 2, 3)
    assert found["with_ties"]["accuracy"] == pytest.approx((2.5 + 0.5 + 0.5) / 6)
    assert (found["evaluator"], found["dtype"], found["fingerprint"]) == ("brightness", "fp32", "b")
    table = pq.read_table(out.with_suffix(".parquet")).to_pylist()
    assert [(row["score_0"], row["score_1"]) for row in table] == [(-a, -b) for a, b in levels]
    assert table[3]["label_0"] == 0.5
    assert not list(out.parent.glob(".*"))
    assert "62.5 %" in capsys.readouterr().out

    # in the softmax of a hundredth of the scores 190 levels differ by 0.74, 10 by 0.05, 1 by 0.005
    held = pairs_file(tmp_path / "held.parquet", [(10, 200), (90, 100), (20, 80)], [1, 0.5, 1])
    assert main([*command, "--tie-pairs", str(held), "--scale", "0.01"]) == 0
    found = json.loads(out.read_text())
    assert found["tie_threshold"] == 0.1
    assert found["with_ties"]["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1 + 1 + 1) / 6)
    assert found["threshold_chosen_on"] == [str(held)]


def test_pairs_that_cannot_be_scored_are_named_or_left_out(
    tmp_path: Path, brightness: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = pairs_file(tmp_path / "p.parquet", [(10, 200), (-1, 20), (30, 20)], [1, 1, 1])
    out = tmp_path / "a.json"
    command = ["accuracy", "--evaluator", "brightness", "--pairs", str(pairs), "--out", str(out)]
    assert main(command) == 2
    shown = capsys.readouterr().err
    assert "1 of 3 pairs cannot be scored" in shown
    assert "row 1: image 0: bytes are not a" in shown
    assert not out.exists()
    assert main([*command, "--allow-missing"]) == 0
    found = json.loads(out.read_text())
    assert found["decided"]["accuracy"] == 0.5
    assert list(found["missing"]) == [f"{pairs} row 1"]
    assert pq.read_table(tmp_path / "a.parquet")["score_0"].to_pylist() == [-10, None, -30]


def test_bad_pairs_are_named_in_their_order(
    tmp_path: Path, brightness: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = pairs_file(tmp_path / "p.parquet", [(-1, 20), (30, 20), (-1, 20)], [1, 1, 1])
    command = ["accuracy", "--evaluator", "brightness", "--pairs", str(pairs)]
    assert main([*command, "--out", str(tmp_path / "a.json")]) == 2
    shown = capsys.readouterr().err
    assert 0 < shown.index("row 0: image 0") < shown.index("row 2: image 0")


@pytest.mark.parametrize("option", ["--pairs", "--tie-pairs"])
def test_scores_are_never_written_over_the_pairs(
    tmp_path: Path, brightness: None, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = pairs_file(tmp_path / "own.parquet", [(10, 200), (30, 20)], [1, 1])
    other = pairs_file(tmp_path / "other.parquet", [(10, 200), (30, 20)], [1, 0.5])
    before = own.read_bytes()
    others = {"--pairs": "--tie-pairs", "--tie-pairs": "--pairs"}[option]
    command = ["accuracy", "--evaluator", "brightness", option, str(own), others, str(other)]
    assert main([*command, "--out", str(tmp_path / "own.json")]) == 2
    assert "would overwrite the pairs" in capsys.readouterr().err
    assert own.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --evaluator or --model"),
        (["--evaluator", "oracle", "--model", "tiny:model"], "one of the two"),
        (["--evaluator", "oracle", "--draws", "3"], "--draws has no effect"),
        (["--evaluator", "oracel"], "did you mean 'oracle'"),
        (["--evaluator", "oracle", "--tie-threshold", "2"], "between 0 and 1"),
        (["--evaluator", "oracle", "--out", "x.txt"], "end in .json"),
        (["--evaluator", "oracle", "--columns", "captoin=x"], "did you mean caption"),
        (["--evaluator", "oracle", "--columns", "caption=x"], "no column 'x'"),
        (["--model", "tiny:model"], "give --reference"),
        (["--model", "tiny:model", "--reference", "tiny:model", "--timesteps", "5-2000"], "it has 0 to 999"),
        (["--model", "tiny:model", "--reference", "tiny:model", "--resolution", "63"], "multiple of"),
    ],
)
def test_mistakes_are_named(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", "--pairs", "tiny:pairs/validation.parquet", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and two runs from it that measured held-out pairs."""
    root = tmp_path_factory.mktemp("world")
    stable_diffusion(root / "base")
    write_pairs(root / "pairs.parquet", rows(8))
    write_pairs(root / "held.parquet", rows(6, first=40))
    for name, kind in (("full", "none"), ("lora", "lora")):
        tree = config(
            root / "base", root / "pairs.parquet", root / name, adapter__type=kind, seed=3,
            data__validation=str(root / "held.parquet"), validation__draws=3,
        )  # fmt: skip
        code, shown = diffpref_here("train", write_config(root / f"{name}.toml", tree))
        assert code == 0, shown
    return root


@pytest.mark.parametrize("run", ["full", "lora"])
def test_the_implicit_reward_is_what_training_measured(world: Path, run: str, tmp_path: Path) -> None:
    measured = next(row["validation"] for row in reversed(metrics(world / run)) if "validation" in row)
    out = tmp_path / "a.json"
    code, shown = diffpref_here(
        "accuracy", "--model", world / run / "model", "--pairs", world / "held.parquet", "--draws", 3,
        "--seed", 3, "--resolution", 32, "--batch", 4, "--out", out,
    )  # fmt: skip
    assert code == 0, shown
    found = json.loads(out.read_text())
    assert found["implicit_reward"]["reference"] == str(world / "base")
    assert found["decided"]["accuracy"] == pytest.approx(measured["pair_accuracy"])
    margins = [
        (row["score_0"] - row["score_1"]) * (2 * row["label_0"] - 1)
        for row in pq.read_table(tmp_path / "a.parquet").to_pylist()
    ]
    # Four errors of about 1 in fp32 go into a margin: other kernels round each by up to 2**-24.
    assert np.mean(margins) == pytest.approx(measured["margin"], rel=1e-3, abs=4 * 2**-24)
    assert abs(np.mean(margins)) > 1e-6


def test_a_model_against_itself_prefers_nothing(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    base = str(world / "base")
    code, shown = diffpref_here(
        "accuracy", "--model", base, "--reference", base, "--pairs", world / "held.parquet", "--draws", 1,
        "--out", out,
    )  # fmt: skip
    assert code == 0, shown
    found = json.loads(out.read_text())
    assert found["decided"]["accuracy"] == 0.5
    assert found["equal_scores"] == found["pairs"] == 6


def test_a_stopped_measurement_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = write_pairs(tmp_path / "many.parquet", rows(70))
    calls: list[int] = []
    rewards = ImplicitReward.rewards

    def counted(self: ImplicitReward, table: LabelledPairs, chosen: list[int]) -> list:
        calls.append(len(chosen))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rewards(self, table, chosen)

    monkeypatch.setattr(ImplicitReward, "rewards", counted)

    def measure(name: str) -> int:
        return diffpref_here(
            "accuracy", "--model", world / "full" / "model", "--pairs", pairs, "--draws", 1, "--batch", 32,
            "--out", tmp_path / f"{name}.json",
        )[0]  # fmt: skip

    assert measure("stopped") == 130
    assert not (tmp_path / "stopped.json").exists()
    assert measure("stopped") == 0
    assert calls == [32, 32, 6, 6]  # the first block of 64 was kept
    assert measure("whole") == 0
    for ending in ("json", "parquet"):
        whole = (tmp_path / f"whole.{ending}").read_bytes()
        assert (tmp_path / f"stopped.{ending}").read_bytes() == whole


def test_a_reference_of_another_vae_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stable_diffusion(tmp_path / "other", seed=5)
    command = ["accuracy", "--model", str(world / "full" / "model"), "--reference", str(tmp_path / "other")]
    assert main([*command, "--pairs", str(world / "held.parquet")]) == 2
    shown = capsys.readouterr().err
    assert "differ in more than their weights of the UNet" in shown
    assert "another VAE and another text encoder" in shown


def test_dual_captions_go_to_their_own_image(tmp_path: Path) -> None:
    path = pairs_file(tmp_path / "p.parquet", [(1, 2)], [1], caption_0="left", caption_1="right")
    pairs = LabelledPairs(str(path), columns_of({}), "dual")
    assert pairs.texts == [("left", "right")]
    assert pairs.prompts == ["prompt 0"]
    assert LabelledPairs(str(path), columns_of({}), "shared").texts == [("prompt 0", "prompt 0")]
