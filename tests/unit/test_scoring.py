from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffpref.data.images import decode_for_scoring
from diffpref.errors import UserError
from diffpref.evaluators import EVALUATORS, Column, Evaluator, Runtime
from diffpref.scoring import passes, score
from diffpref.tiny.oracle import judge
from tests.evaluators import SmallNet
from tests.report_folders import scored_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_folder(tmp_path_factory.mktemp("scored") / "base", 0.5, prompts=8)


@pytest.fixture
def folder(scored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scored, tmp_path / "base"))


def png(colour: str | tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def table(path: Path, images: list[bytes], prompts: list[str]) -> None:
    pq.write_table(pa.table({"image": images, "prompt": prompts}), path)


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
    (folder / "images" / "00001-s0.png").unlink()
    with pytest.raises(UserError) as raised:
        score(folder, ["oracle"])
    assert str(path) in str(raised.value)
    assert reason in str(raised.value)
    assert "2 of 16 images cannot be scored" in str(raised.value)
    assert "00001-s0.png: the file is missing" in str(raised.value)
    assert (folder / "scores.parquet").read_bytes() == before

    allowed = pq.read_table(score(folder, ["oracle"], allow_missing=True)).to_pylist()
    assert [row["id"] for row in allowed if row["oracle"] is None] == ["00001-s0", "00003-s1"]
    errors = {row["id"]: row["error"] for row in allowed if row["error"]}
    assert reason in errors["00003-s1"]
    told = json.loads((folder / "scores.json").read_text())["missing"]
    assert {entry["id"]: entry["reason"] for entry in told} == errors
    assert told[0]["file"] == "images/00001-s0.png"
    old = {row["id"]: row for row in pq.read_table(pa.BufferReader(before)).to_pylist()}
    for row in allowed:
        if not row["error"]:
            assert {name: row[name] for name in old[row["id"]]} == old[row["id"]]


def test_many_bad_images_are_counted_and_the_first_twenty_named(tmp_path: Path) -> None:
    images = [png("red")] + [b"damaged"] * 30
    table(tmp_path / "t.parquet", images, ["a red circle"] * 31)
    with pytest.raises(UserError) as raised:
        score(tmp_path / "t.parquet", ["oracle"])
    assert "30 of 31 images" in str(raised.value)
    assert "row 20: bytes are not a" in str(raised.value)
    assert "row 21:" not in str(raised.value)
    assert "and 10 more" in str(raised.value)
    table(tmp_path / "t.parquet", [b"damaged"] * 3, ["a red circle"] * 3)
    with pytest.raises(UserError, match="3 of 3 images cannot be scored"):
        score(tmp_path / "t.parquet", ["oracle"], allow_missing=True)


def test_what_was_scored_before_a_failure_is_not_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the block of the bad image is, and the end result is that of an undisturbed run."""
    seen: list[int] = []

    class Counting(Brightness):
        def score(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
            seen.append(len(images))
            return super().score(images, prompts)

    monkeypatch.setitem(EVALUATORS, "brightness", lambda _: Counting())
    prompts = [str(number) for number in range(200)]
    images = [png((number, 0, 0)) for number in range(200)]
    for name in ("broken", "whole"):
        (tmp_path / name).mkdir()
    table(tmp_path / "broken" / "t.parquet", [*images[:70], b"", *images[71:]], prompts)
    with pytest.raises(UserError, match="1 of 200 image"):
        score(tmp_path / "broken", ["brightness"], batch=20)
    assert sum(seen) == 199
    assert (tmp_path / "broken" / ".scores").is_dir()
    seen.clear()
    table(tmp_path / "broken" / "t.parquet", images, prompts)
    repaired = score(tmp_path / "broken", ["brightness"], batch=20)
    assert sum(seen) == 80  # blocks of four batches of 20
    assert not (tmp_path / "broken" / ".scores").exists()
    table(tmp_path / "whole" / "t.parquet", images, prompts)
    assert repaired.read_bytes() == score(tmp_path / "whole", ["brightness"], batch=20).read_bytes()
    seen.clear()
    score(tmp_path / "whole", ["brightness"], batch=7)
    assert seen == []  # finished scores of the same images and evaluator are kept
    monkeypatch.setattr(Counting, "fingerprint", "c")
    score(tmp_path / "whole", ["brightness"], batch=20)
    assert sum(seen) == 200


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
    assert out == tmp_path / "images.csv.scores.parquet"
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


def test_each_image_is_decoded_once_for_all_evaluators(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counting(data: bytes) -> Image.Image:
        decoded.append(len(data))
        return decode_for_scoring(data)

    monkeypatch.setattr(passes, "decode_for_scoring", counting)
    monkeypatch.setitem(EVALUATORS, "brightness", lambda _: Brightness())
    monkeypatch.setitem(EVALUATORS, "smallnet", SmallNet)
    rows = pq.read_table(score(folder, ["brightness", "smallnet"], batch=3)).to_pylist()
    assert len(decoded) == 16
    net = SmallNet(Runtime())
    for row in rows:
        image = Image.open(folder / row["file"])
        assert row["smallnet"] == pytest.approx(net.score([image], [row["prompt"]])[0], rel=1e-5)
        assert row["brightness"] == np.float32(np.asarray(image).mean())
        assert row["smallnet.size"] == "64"


def test_an_evaluator_may_be_called_as_if_it_were_anothers_detail(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hps-v2 and hps-v2.1: scored together, apart, and again."""

    class Older(Brightness):
        name = "b-v2"

    class Newer(Brightness):
        name = "b-v2.1"

        def columns(self) -> dict[str, Column]:
            return {}

        def score(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
            return -super().score(images, prompts)

    monkeypatch.setitem(EVALUATORS, "b-v2", lambda _: Older())
    monkeypatch.setitem(EVALUATORS, "b-v2.1", lambda _: Newer())
    for names in (["b-v2", "b-v2.1"], ["b-v2.1"], ["b-v2"], ["b-v2.1", "b-v2"]):
        found = pq.read_table(score(folder, names))
        assert sorted(found.column_names[7:]) == sorted({*found.column_names[7:]})
        assert found["b-v2.1"].to_pylist() == [-value for value in found["b-v2"].to_pylist()]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    columns = {"left": [png("red"), png("blue")], "said": ["", "a blue square"], "sort": ["x", "y"]}
    pq.write_table(pa.table(columns | {"name": ["p", "q"], "n": [4, 4]}), tmp_path / "t.parquet")
    names = {"image": "left", "prompt": "said", "kind": "sort", "id": "name", "prompt_id": "n"}
    place = tmp_path / "t.parquet"
    EVALUATORS["smallnet"] = SmallNet
    try:
        rows = pq.read_table(score(place, ["smallnet"], columns=names)).to_pylist()
        with pytest.raises(UserError, match=r"has no image column(.|\n)*--columns image="):
            score(place, ["smallnet"])
        with pytest.raises(UserError, match="did you mean prompt"):
            score(place, ["smallnet"], columns={"promt": "said"})
        with pytest.raises(UserError, match="no kind column"):
            score(place, ["smallnet"], columns={**names, "kind": "sorts"})
    finally:
        del EVALUATORS["smallnet"]
    assert [row["id"] for row in rows] == ["p", "q"]
    assert [row["kind"] for row in rows] == ["x", "y"]
    assert [row["prompt_id"] for row in rows] == [4, 4]
    assert rows[0]["prompt"] == ""  # an empty prompt is a prompt
    assert rows[0]["smallnet"] == 0


def test_prompts_are_wanted_only_by_evaluators_that_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EVALUATORS, "brightness", lambda _: Brightness())
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "black").save(tmp_path / "b.gif")
    rows = pq.read_table(score(tmp_path, ["brightness"])).to_pylist()
    assert [(row["file"], row["brightness"]) for row in rows] == [("a.png", 255), ("b.gif", 0)]
    assert [row["prompt_id"] for row in rows] == [0, 1]
    with pytest.raises(UserError, match="has no prompt, nor have 1 others"):
        score(tmp_path, ["brightness", "oracle"])
    pq.write_table(pa.table({"image": [png("red")] * 2, "prompt": ["a", None]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"row 1 has no prompt"):
        score(tmp_path / "t.parquet", ["oracle"])


def test_a_folder_of_parquet_files_is_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVALUATORS, "brightness", lambda _: Brightness())
    colours = [(0, 0, 0), (30, 30, 30), (90, 90, 90)]
    table(tmp_path / "a-0.parquet", [png(colours[0]), png(colours[1])], ["x", "y"])
    table(tmp_path / "a-1.parquet", [png(colours[2])], ["x"])
    for _ in range(2):  # the second time scores.parquet lies beside them
        rows = pq.read_table(score(tmp_path, ["brightness"])).to_pylist()
        assert [row["brightness"] for row in rows] == [0, 30, 90]
        assert [row["prompt_id"] for row in rows] == [0, 1, 0]


def test_a_large_parquet_file_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 images of half a megabyte: the peak of memory rises by less than half of that."""
    monkeypatch.setitem(EVALUATORS, "brightness", lambda _: Brightness())
    place = tmp_path / "t.parquet"
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (420, 420, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "BMP")
    row = pa.table({"image": [buffer.getvalue()], "prompt": ["x"]})
    with pq.ParquetWriter(place, row.schema) as writer:
        for _ in range(600):
            writer.write_table(row)
    assert place.stat().st_size > 300e6
    code = (
        "import resource, sys; from diffpref.evaluators import EVALUATORS;"
        "from diffpref.scoring import score;"
        "from tests.unit.test_scoring import Brightness;"
        "EVALUATORS['brightness'] = lambda _: Brightness();"
        "import torch; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "score(sys.argv[1], ['brightness'], batch=8);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(done.stdout) * 1024 < 0.5 * place.stat().st_size


@pytest.mark.parametrize("weights", [{"smallnet": "x"}, {"oracle": "x"}])
def test_weights_without_effect_are_refused(folder: Path, weights: dict[str, str]) -> None:
    with pytest.raises(UserError, match="weights"):
        score(folder, ["oracle"], weights=weights)


def test_lower_precision_is_recorded_and_never_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVALUATORS, "smallnet", SmallNet)
    full = pq.read_table(score(folder, ["smallnet"]))["smallnet"]
    half = pq.read_table(score(folder, ["smallnet"], runtime=Runtime(dtype="bf16")))["smallnet"]
    assert full != half
    about = json.loads((folder / "scores.json").read_text())["evaluators"]["smallnet"]
    assert (about["dtype"], about["device"]) == ("bf16", "cpu")


def test_places_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        score(tmp_path / "nothing", ["oracle"])
    with pytest.raises(UserError, match="holds no images"):
        score(tmp_path, ["oracle"])
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="has no prompt column"):
        score(tmp_path / "t.parquet", ["oracle"])
