from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from diffpref.cli import main
from diffpref.evaluation import Contestant, contestant, label_of
from diffpref.families.miniature import stable_diffusion
from tests import forked
from tests.miniatures import save_lora

SUITE = str(Path(__file__).parents[1] / "data" / "suite.toml")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    stable_diffusion(root / "base")
    stable_diffusion(root / "runs" / "other" / "model", seed=4)
    (root / "runs" / "dpo" / "model").mkdir(parents=True)
    save_lora(root / "runs" / "dpo" / "model", base=str(root / "base"))
    return root


def command(models: Path, out: Path, *options: str) -> list[str]:
    return [
        "evaluate", "--baseline", str(models / "base"), "--candidate", str(models / "runs" / "dpo" / "model"),
        f"full={models / 'runs' / 'other'}", "--suite", SUITE, "--limit", "3", "--evaluators", "oracle",
        "--out", str(out), *options,
    ]  # fmt: skip


def files(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.suffix == ".png"
    }


def test_one_command_draws_scores_and_reports_and_uses_what_is_there(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(models, out)) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "base", "dpo", "full", "report.html", "report.json",
    ]  # fmt: skip
    numbers = json.loads((out / "report.json").read_text())
    assert (numbers["baseline"], numbers["candidates"]) == ("base", ["dpo", "full"])
    assert (numbers["prompt_count"], numbers["setting_differences"]) == (3, [])
    for name in ("base", "dpo", "full"):
        table = pq.read_table(out / name / "scores.parquet")
        assert len(table) == 6
        mean = sum(table["oracle"].to_pylist()) / 6
        assert numbers["results"][name]["oracle"]["mean"] == pytest.approx(mean)
    shown = capsys.readouterr().out
    assert "| dpo |" in shown
    assert shown.endswith(f"{out / 'report.html'}\n")

    before = files(out)
    (out / "dpo" / "images" / "00001-s1.png").unlink()
    assert main(command(models, out)) == 0
    after = files(out)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == ["dpo/images/00001-s1.png"]
    again = json.loads((out / "report.json").read_text())
    assert again["results"] == numbers["results"]

    assert main(command(models, out, "--steps", "1")) == 2
    assert "suite.steps: 2 -> 1" in capsys.readouterr().err


def test_a_folder_that_was_drawn_already_may_be_the_baseline(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "earlier"
    draw = [
        "generate",
        "--model",
        str(models / "base"),
        "--suite",
        SUITE,
        "--limit",
        "2",
        "--out",
        str(drawn),
    ]
    assert main([*draw, "--steps", "1"]) == 0
    options = ["--suite", SUITE, "--limit", "2", "--evaluators", "oracle", "--out", str(tmp_path / "out")]
    compare = ["evaluate", "--baseline", str(drawn), "--candidate", str(models / "runs" / "other"), *options]
    assert main(compare) == 2
    assert "suite.steps: 1 -> 2" in capsys.readouterr().err
    assert main([*compare, "--force"]) == 0
    assert "settings differ: other: suite.steps: 1 -> 2" in capsys.readouterr().out
    compare[2] = f"old={drawn}"
    assert main([*compare, "--force"]) == 0
    assert "| old |" in capsys.readouterr().out
    assert not (tmp_path / "out" / "earlier").exists()


def test_mistakes_are_found_before_anything_is_drawn(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for options, words in [
        (["--evaluators", "oracel"], "did you mean 'oracle'"),
        (["--weights", "pickscore=x"], "not among the evaluators"),
        (["--suite", "nothing"], "no suite named"),
        (["--candidate", f"base={models}"], "two models are called 'base'"),
        (["--candidate", f"late={models / 'none'}"], "model not found"),
        (["--candidate", f"late={models}"], "is not a model"),
        (["--evaluators", "pickscore", "--weights", f"pickscore={tmp_path}"], "fix: check the folder"),
    ]:
        assert main([*command(models, out), *options]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(models, out)) == 2
    assert "does not find the others" in capsys.readouterr().err
    assert not out.exists()


def test_labels() -> None:
    assert contestant("dpo=runs/a/model") == Contestant("dpo", "runs/a/model")
    assert contestant("org/some=model").source == "org/some=model"
    assert [label_of(text) for text in ("runs/dpo/model", "tiny:model", "org/sd-1.5", "runs/a b/", ".")] == [
        "dpo", "tiny", "sd-1.5", "a-b", "model",
    ]  # fmt: skip


def test_a_limit_is_that_of_the_report_too(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(command(models, out, "--limit", "5")) == 0
    assert main(command(models, out, "--limit", "2")) == 0
    assert json.loads((out / "report.json").read_text())["prompt_count"] == 2
    drawn = [str(out / name) for name in ("base", "dpo")]
    words = ["evaluate", "--baseline", drawn[0], "--candidate", drawn[1], "--suite", SUITE, "--limit", "3"]
    assert main([*words, "--evaluators", "oracle", "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "report.json").read_text())["prompt_count"] == 3


@pytest.mark.parametrize("typo", ["runs/typo", "no/such/model", "cut"])
def test_a_candidate_that_cannot_be_had_is_told_before_anything_is_drawn(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], typo: str
) -> None:
    """runs/typo may be a hub id; the model in `cut` lacks a part."""
    if typo == "cut":
        typo = shutil.copytree(models / "base", tmp_path / "cut")
        shutil.rmtree(tmp_path / "cut" / "vae")
    out = tmp_path / "out"
    words = ["evaluate", "--baseline", str(models / "base"), "--candidate", str(typo), "--suite", SUITE]
    assert main([*words, "--evaluators", "oracle", "--out", str(out)]) == 2
    assert not out.exists()
    assert capsys.readouterr().err.count("error:") == 1


def test_processes_share_an_evaluation(models: Path, tmp_path: Path) -> None:
    assert main(command(models, tmp_path / "one")) == 0
    for one in forked.launch(2, tmp_path / "log", *command(models, tmp_path / "two")):
        one.finish()
    numbers = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert numbers[0]["results"] == numbers[1]["results"]
    assert numbers[0]["prompts"] == numbers[1]["prompts"]
