from __future__ import annotations

import csv
import json
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffpref.errors import UserError
from diffpref.evaluators import EVALUATORS, Column, Evaluator
from diffpref.scoring import score
from diffpref.tiny.oracle import judge
from tests.report_folders import scored_folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_folder(tmp_path_factory.mktemp("scored") / "base", 0.5, prompts=8)


@pytest.fixture
def folder(scored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scored, tmp_path / "base"))


class Brightness:
    """A second evaluator: mean grey level, prompts ignored."""

    name, version, higher_is_better, needs_prompt = "brightness", "1", False, False
    scale, fingerprint = "0 to 255", "b"

    def columns(self) -> dict[str, Column]:
        return {"brightness": Column("Brightness", self.scale, higher_is_better=False)}

    def score(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        return np.array([np.asarray(image).mean() for image in images], np.float32)


def test_scores_are_the_judges_for_each_image_and_its_prompt(scored: Path) -> None:
    table = pq.read_table(scored / "scores.parquet")
    names = ["facts", "all_correct", "style", "verdict", "caption"]
    assert table.column_names[7:] == ["oracle", *(f"oracle.{name}" for name in names)]
    assert table.schema.field("oracle").type == pa.float32()
    assert len(table) == 16
    for row in table.to_pylist():
        expected = judge(Image.open(scored / row["file"]), row["prompt"])
        assert row["oracle"] == pytest.approx(expected.utility, abs=1e-6)
        assert row["oracle.all_correct"] == float(expected.all_correct)
        held, failed = len(expected.held), len(expected.failed)
        assert row["oracle.verdict"].startswith(f"{held}/{held + failed}")
        assert all(f"not {fact}" in row["oracle.verdict"] for fact in expected.failed)


def test_what_the_columns_mean_stands_beside_them(scored: Path) -> None:
    about = json.loads((scored / "scores.json").read_text())["evaluators"]["oracle"]
    assert about["higher_is_better"] is True
    assert about["needs_prompt"] is True
    assert about["columns"]["oracle.all_correct"]["label"] == "All correct"


def test_a_score_does_not_depend_on_the_batch(scored: Path, folder: Path) -> None:
    first = pq.read_table(scored / "scores.parquet")
    for batch in (1, 5):
        assert pq.read_table(score(folder, ["oracle"], batch=batch)).equals(first)


def test_a_second_evaluator_keeps_the_first_ones_scores(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(Brightness(), Evaluator)
    monkeypatch.setitem(EVALUATORS, "brightness", lambda _: Brightness())
    before = pq.read_table(folder / "scores.parquet")
    after = pq.read_table(score(folder, ["brightness"]))
    assert after.select(before.column_names).equals(before)
    assert "brightness" in after.column_names
    assert set(json.loads((folder / "scores.json").read_text())["evaluators"]) == {"oracle", "brightness"}


def test_scores_of_images_that_changed_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVALUATORS, "brightness", lambda _: Brightness())
    Image.new("RGB", (64, 64), "white").save(folder / "images" / "00000-s0.png")
    assert "oracle" not in pq.read_table(score(folder, ["brightness"])).column_names


@pytest.mark.parametrize(
    ("data", "reason"),
    [(None, "missing"), (b"", "zero bytes"), (b"not an image", "not a"), ("cut", "truncated")],
)
def test_a_missing_or_broken_image_is_named_and_old_scores_stay(
    folder: Path, data: bytes | str | None, reason: str
) -> None:
    path = folder / "images" / "00003-s1.png"
    before = (folder / "scores.parquet").read_bytes()
    whole = path.read_bytes()
    path.unlink()
    if data is not None:
        path.write_bytes(whole[: len(whole) // 2] if data == "cut" else data)  # type: ignore[arg-type]
    with pytest.raises(UserError) as raised:
        score(folder, ["oracle"])
    assert str(path) in str(raised.value)
    assert reason in str(raised.value)
    assert (folder / "scores.parquet").read_bytes() == before


def test_an_unknown_evaluator_is_answered_with_the_nearest_name(folder: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'oracle'"):
        score(folder, ["oracel"])
    with pytest.raises(UserError, match="no evaluator"):
        score(folder, [])


def test_images_and_prompts_may_come_from_csv_parquet_or_text_files(scored: Path, tmp_path: Path) -> None:
    rows = pq.read_table(scored / "scores.parquet").to_pylist()[:4]
    expected = [row["oracle"] for row in rows]

    with open(tmp_path / "images.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file_name", "prompt"])
        writer.writerows([str(scored / row["file"]), row["prompt"]] for row in rows)
    out = score(tmp_path / "images.csv", ["oracle"])
    assert out == tmp_path / "images.scores.parquet"
    assert pq.read_table(out)["oracle"].to_pylist() == expected

    images = [{"bytes": (scored / row["file"]).read_bytes(), "path": None} for row in rows]
    pq.write_table(
        pa.table({"image": images, "caption": [row["prompt"] for row in rows]}), tmp_path / "t.parquet"
    )
    assert pq.read_table(score(tmp_path / "t.parquet", ["oracle"]))["oracle"].to_pylist() == expected

    loose = tmp_path / "loose"
    loose.mkdir()
    for number, row in enumerate(rows):
        shutil.copy(scored / row["file"], loose / f"{number}.png")
        (loose / f"{number}.txt").write_text(row["prompt"] + "\n")
    assert pq.read_table(score(loose, ["oracle"]))["oracle"].to_pylist() == expected
    (loose / "2.txt").unlink()
    with pytest.raises(UserError, match=r"2.png has no prompt"):
        score(loose, ["oracle"])


def test_prompts_repeat_and_images_of_one_prompt_share_its_id(tmp_path: Path) -> None:
    buffer = BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    pq.write_table(
        pa.table({"image": [buffer.getvalue()] * 3, "prompt": ["a circle", "a square", "a circle"]}),
        tmp_path / "t.parquet",
    )
    table = pq.read_table(score(tmp_path / "t.parquet", ["oracle"]))
    assert table["prompt_id"].to_pylist() == [0, 1, 0]


def test_places_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        score(tmp_path / "nothing", ["oracle"])
    with pytest.raises(UserError, match="holds no images"):
        score(tmp_path, ["oracle"])
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="has no prompt column"):
        score(tmp_path / "t.parquet", ["oracle"])
