from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.cli import main
from diffpref.errors import UserError
from diffpref.reporting.loading import load_folders
from diffpref.reporting.report import write_report
from tests.report_folders import scored_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("comparable")
    scored_folder(root / "base", 0.4, prompts=8)
    scored_folder(root / "dpo", 0.9, prompts=8)
    scored_folder(root / "more", 0.9, prompts=10, seeds=3)
    return root


def changed(folder: Path, to: Path, change: dict) -> Path:
    shutil.copytree(folder, to)
    manifest = json.loads((to / "manifest.json").read_text())
    (manifest if "dtype" in change else manifest["suite"]).update(change)
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


@pytest.mark.parametrize(
    "change",
    [
        {"scheduler": "euler"}, {"steps": 4}, {"guidance": 1.0}, {"width": 32}, {"negative_prompt": "ugly"},
        {"seeds": [4, 5]}, {"dtype": "fp16"},
    ],
)  # fmt: skip
def test_each_setting_is_refused_and_compared_when_forced(root: Path, tmp_path: Path, change: dict) -> None:
    key, value = next(iter(change.items()))
    other = changed(root / "dpo", tmp_path / "other", change)
    with pytest.raises(UserError) as raised:
        load_folders(root / "base", [other])
    assert f"{key}: " in str(raised.value)
    assert f"-> {value}" in str(raised.value)
    assert "--force" in str(raised.value)
    report = write_report(root / "base", [other], tmp_path / "r.html", resamples=50, force=True)
    assert len(report["setting_differences"]) == 1
    line = report["setting_differences"][0]
    assert line.startswith("other: ")
    assert f"{key}: " in line
    fair = write_report(root / "base", [root / "dpo"], tmp_path / "fair.html", resamples=50)
    assert fair["setting_differences"] == []
    assert report["results"]["other"] == fair["results"]["dpo"]


def test_another_file_format_is_a_difference(root: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(root / "dpo", tmp_path / "other"))
    table = pq.read_table(other / "scores.parquet")
    files = [file.replace(".png", ".jpg") for file in table["file"].to_pylist()]
    place = table.column_names.index("file")
    pq.write_table(table.set_column(place, "file", [files]), other / "scores.parquet")
    with pytest.raises(UserError, match=r"file_format: .png -> .jpg"):
        load_folders(root / "base", [other])


def test_forced_folders_are_compared_over_the_prompts_and_images_they_share(root: Path) -> None:
    base, more = load_folders(root / "base", [root / "more"], force=True)
    assert any("16 only in base" in line or "only in more" in line for line in more.differences)
    assert [row["prompt"] for row in base.rows] == [row["prompt"] for row in more.rows]
    assert len({row["prompt"] for row in base.rows}) < 10
    assert max(int(row["id"][-1]) for row in more.rows) <= 1  # two seeds are all that base has


def test_prompts_are_matched_by_text_and_not_by_number(root: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(root / "dpo", tmp_path / "other"))
    table = pq.read_table(other / "scores.parquet")
    place = table.column_names.index("prompt_id")
    reversed_ids = pa.array([7 - number for number in table["prompt_id"].to_pylist()])
    pq.write_table(table.set_column(place, "prompt_id", reversed_ids), other / "scores.parquet")
    report = write_report(root / "base", [other], tmp_path / "r.html", resamples=50, force=True)
    plain = write_report(root / "base", [root / "dpo"], tmp_path / "p.html", resamples=50)
    assert report["results"]["other"] == plain["results"]["dpo"]


def test_evaluators_that_differ_are_refused_even_when_forced(root: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(root / "dpo", tmp_path / "other"))
    about = json.loads((other / "scores.json").read_text())
    about["evaluators"]["oracle"]["dtype"] = "bf16"
    (other / "scores.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"evaluators.oracle.dtype: fp32 -> bf16"):
        load_folders(root / "base", [other], force=True)


def test_the_command_takes_force(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = changed(root / "dpo", tmp_path / "other", {"steps": 4})
    command = ["report", "--baseline", str(root / "base"), "--candidate", str(other)]
    out = str(tmp_path / "r.html")
    assert main([*command, "--out", out]) == 2
    assert "suite.steps: 20 -> 4" in capsys.readouterr().err
    assert main([*command, "--out", out, "--force"]) == 0
    numbers = json.loads((tmp_path / "r.json").read_text())
    assert numbers["setting_differences"] == ["other: suite.steps: 20 -> 4"]
