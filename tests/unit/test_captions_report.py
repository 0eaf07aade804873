from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffpref.captions.report import write_captions_report
from diffpref.captions.sheet import build_sheet
from diffpref.captions.survey import FLAGS, survey
from diffpref.cli import main
from diffpref.data.schema import PickAPicColumns, open_file
from diffpref.errors import UserError
from tests.caption_folders import PAIRS, tiny_clip, tiny_rows, tiny_tokenizer, write_captions
from tests.pages import Page

COUNT = 90
NASTY = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</style></script>{{ 7 * 7 }} & &amp; 'quotes' \"more\"",
    "👩‍👩‍👧 🐱 emoji 🏳️‍🌈 garden",
    "قطة حمراء على طاولة خشبية صغيرة، لوحة زيتية",
    "赤い猫が机の上に座っている。",
    "very long " * 1000,
    "line\nbreak\ttab \u202e reversed \x00 zero",
]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return tiny_rows("hybrid", COUNT, level="strong")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    root = tmp_path_factory.mktemp("captions")
    write_captions(root / "hybrid", rows)
    write_captions_report(root / "hybrid", root / "report.html", tokenizer="tiny:model")
    return root


@pytest.fixture(scope="module")
def report(root: Path) -> dict[str, Any]:
    return json.loads((root / "report.json").read_text())


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "report.html").read_text()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "model")


def sides(row: dict[str, Any]) -> tuple[int, int] | None:
    """Winner and loser."""
    return {1.0: (0, 1), 0.0: (1, 0)}.get(row["label_0"])


def test_counts_equal_a_plain_count_of_the_rows(report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    decided = [row for row in rows if sides(row)]
    assert (report["rows"], report["captioned"], report["missing"]) == (COUNT, COUNT, 0)
    assert (report["decided"], report["undecided"]) == (len(decided), COUNT - len(decided))
    assert 0 < report["undecided"] < 20
    perturbed = [row[f"origin_{sides(row)[1]}"] for row in decided]
    unchanged = sum(not origin["changed"] for origin in perturbed)
    assert unchanged > 0
    assert report["unchanged"]["levels"] == {
        "strong": {"perturbed": len(decided), "unchanged": unchanged, "share": unchanged / len(decided)}
    }
    equal = sum(row["caption_0"] == row["caption_1"] for row in rows)
    assert report["equal"] == {"count": equal, "share": equal / COUNT}
    assert sum(report["near_duplicates"]["counts"]) == COUNT
    assert report["near_duplicates"]["count"] == sum(report["near_duplicates"]["counts"][18:])
    assert report["near_duplicates"]["count"] >= equal


@pytest.mark.parametrize("role", ["winner", "loser", "prompt"])
def test_token_lengths_and_repeats_by_role(
    report: dict[str, Any], rows: list[dict[str, Any]], role: str
) -> None:
    if role == "prompt":
        texts = [row["caption"] for row in rows]
    else:
        texts = [row[f"caption_{sides(row)[role == 'loser']}"] for row in rows if sides(row)]
    tokenizer = tiny_tokenizer()
    lengths = np.array([len(tokenizer(text).input_ids) for text in texts])
    found = report["tokens"]["roles"][role]
    assert (found["count"], found["max"], found["cut"]) == (len(texts), lengths.max(), 0)
    assert found["mean"] == pytest.approx(lengths.mean())
    assert found["median"] == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert found["p95"] == np.quantile(lengths, 0.95, method="inverted_cdf")
    assert found["counts"] == np.histogram(lengths, report["tokens"]["edges"])[0].tolist()
    counts = Counter(texts)
    repeated = sum(n for n in counts.values() if n > 1)
    repeats = report["repeats"][role]
    assert (repeats["distinct"], repeats["repeated"]) == (len(counts), repeated)
    assert repeats["most"][0]["count"] == max(counts.values())


def test_how_it_was_made(report: dict[str, Any], page: str) -> None:
    assert report["method"] == "hybrid"
    by_role = {entry["role"]: entry for entry in report["provenance"]}
    assert by_role["loser"]["perturber"]["level"] == "strong"
    assert by_role["winner"]["captioner"]["backend"] == "oracle"
    assert by_role["winner"]["perturber"] == {}
    assert report["left_out"]["count"] == 3
    assert report["left_out"]["reasons"] == {"empty_answer": 3}
    assert "the model said &lt;nothing&gt;" in page
    made, again = report["commands"]
    assert made.startswith(
        "diffpref caption --pairs tiny:pairs/train.parquet --method hybrid --captioner oracle "
        "--perturber rules --perturber.level strong --tokenizer tiny:model --limit 90 --replace --out "
    )
    assert report["tokens"]["tokenizer"] == "tiny:model"
    assert again.startswith("diffpref caption-report ")
    assert again.endswith("--tokenizer tiny:model")


def test_the_sheet_shows_a_fair_sample_and_what_deserves_a_look(report: dict[str, Any], page: str) -> None:
    assert 36 <= len(report["sample"]) <= 36 + 4 * len(FLAGS)
    plain = Counter(row["file"] for row in report["sample"] if not row["flags"])
    assert set(plain) == set(report["files"])  # of all parts, not their beginning
    assert plain["part-00000.parquet"] < 25
    seen = Counter(flag for row in report["sample"] for flag in row["flags"])
    assert seen["unchanged"] >= min(4, report["unchanged"]["unchanged"])
    assert seen["no preference"] >= 4
    parsed = Page(page)
    items = [attributes for tag, attributes in parsed.elements if "data-flags" in attributes]
    assert [json.loads(item["data-flags"]) for item in items] == [row["flags"] for row in report["sample"]]
    assert len(parsed.all("img")) == 2 * len(items)
    assert page.count("▲ winner") == page.count("▼ loser") == len(items) - seen["no preference"]


def test_the_sample_depends_on_the_rows_alone(
    tmp_path: Path, rows: list[dict[str, Any]], report: dict[str, Any]
) -> None:
    folder = write_captions(tmp_path / "again", rows)
    for part in folder.glob("*.parquet"):
        table = pq.read_table(part)
        pq.write_table(table, part, row_group_size=5)
    again = write_captions_report(folder, tmp_path / "again.html")
    assert again["sample"] == report["sample"]


def test_the_page_needs_nothing_but_itself_and_can_be_read_without_eyes(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, name)
    assert "url(" not in page
    assert "@import" not in page
    assert "://" not in re.sub(r"data:image[^\"]*", "", page)
    assert all(image["alt"] for image in parsed.all("img"))
    assert all("aria-label" in svg for svg in parsed.all("svg"))
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in parsed.all("a")} <= set(ids)
    assert len(page) < 6_000_000


def test_differences_are_marked(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    row = {**rows[0], "caption_0": "a red circle", "caption_1": "a blue circle", "label_0": 1.0}
    row["origin_1"] = {**rows[0]["origin_1"], "before": "a green circle"}
    write_captions_report(write_captions(tmp_path / "one", [row]), tmp_path / "one.html")
    page = (tmp_path / "one.html").read_text()
    assert "a <mark>red</mark> circle" in page
    assert "a <mark>blue</mark> circle" in page
    assert "from “a <del>green</del> circle”" in page
    assert "Captions of 1 pair" in page


def test_nothing_in_a_caption_becomes_markup(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    nasty = [
        {**rows[n], "caption": text, "caption_0": text, "caption_1": text[: len(text) // 2] + " end"}
        for n, text in enumerate(NASTY)
    ]
    found = write_captions_report(write_captions(tmp_path / "nasty", nasty), tmp_path / "nasty.html")
    page = (tmp_path / "nasty.html").read_text()
    parsed = Page(page)
    assert parsed.open == []
    assert len(parsed.all("script")) == 1
    assert not any("onerror" in attributes for _, attributes in parsed.elements)
    text = re.sub(r"</?mark>", "", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "{{ 7 * 7 }}" in text
    assert "👩‍👩‍👧 🐱 emoji 🏳️‍🌈 garden" in text
    assert "قطة حمراء على طاولة خشبية صغيرة، لوحة زيتية" in text
    assert [row["captions"][0] for row in found["sample"]] == NASTY
    assert json.loads((tmp_path / "nasty.json").read_text()) == found


def test_long_captions_count_as_cut(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    long = [{**row} for row in rows[:10]]
    for row in long[:3]:
        row["caption_0"], row["tokens_0"], row["tokens_1"] = "a circle " * 60, 122, 77
    for row in long[3:5]:
        row["caption_0"], row["tokens_0"] = "a circle " * 37, 77
    found = write_captions_report(write_captions(tmp_path / "long", long), tmp_path / "long.html")
    assert found["tokens"]["captions"]["cut"] == 3
    assert found["tokens"]["captions"]["cut_share"] == 3 / 20
    assert sum("cut" in row["flags"] for row in found["sample"]) == 3
    assert any(
        note.startswith("15.0 % of the captions are longer than the 77 tokens") for note in found["notes"]
    )
    page = (tmp_path / "long.html").read_text()
    assert page.count("122 tokens, cut") == page.count("tokens, cut") == 3
    assert 'class="beyond"' in page


def test_pairs_of_others_without_our_columns(tmp_path: Path) -> None:
    """The shipped pairs do not say where their two captions come from, nor does Pick-Double-Caption."""
    table = next(pq.ParquetFile(PAIRS).iter_batches(50))
    table = pa.Table.from_batches([table]).rename_columns(
        ["text" if name == "caption_0" else name for name in table.schema.names]
    )
    pq.write_table(table, tmp_path / "pairs.parquet")
    command = ["caption-report", str(tmp_path / "pairs.parquet"), "--columns.caption_0", "text"]
    assert main([*command, "--out", str(tmp_path / "r.html")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["method"], found["provenance"], found["left_out"]) == ("", [], None)
    assert (found["tokens"], found["unchanged"], found["conflict"]) == (None, None, None)
    assert any("do not say who wrote the captions" in note for note in found["notes"])
    assert any("--tokenizer" in note for note in found["notes"])
    assert len(found["commands"]) == 1
    assert Page((tmp_path / "r.html").read_text()).open == []


def test_rows_without_captions_and_broken_images_are_told(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    some = [{**row} for row in rows[:12]]
    some[0]["caption_0"] = None
    some[1]["caption_1"] = "  "
    some[2]["jpg_0"] = b"no image"
    folder = write_captions(tmp_path / "holes", some, tokens=False)
    found = write_captions_report(folder, tmp_path / "holes.html")
    assert (found["rows"], found["captioned"], found["missing"]) == (12, 10, 2)
    assert any(note.startswith("2 rows are without two captions") for note in found["notes"])
    assert "bytes are not a JPEG, PNG or WEBP image" in (tmp_path / "holes.html").read_text()


def test_the_sheet_keeps_to_its_budget(root: Path) -> None:
    files = [open_file(path) for path in sorted((root / "hybrid").glob("*.parquet"))]
    columns = PickAPicColumns()
    sample = survey(files, columns, 77, 0, None).sample()
    whole = build_sheet(sample, files, columns, 77)
    size = sum(len(side.source) for row in whole[:10] for side in row.sides)
    assert build_sheet(sample, files, columns, 77, budget=size) == whole[:10]
    assert len(build_sheet(sample, files, columns, 77, budget=1)) == 1


def cosines_by_transformers(clip: Path, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The same similarities through CLIPModel's own forward, a pair at a time."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    found: dict[str, list[float]] = {"ww": [], "wl": [], "lw": [], "ll": [], "pw": [], "pl": []}
    for row in rows:
        winner, loser = sides(row)
        images = [Image.open(io.BytesIO(row[f"jpg_{side}"])).convert("RGB") for side in (winner, loser)]
        texts = [row[f"caption_{winner}"], row[f"caption_{loser}"], row["caption"]]
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            output = model(**inputs)
        cosines = (output.logits_per_text / model.logit_scale.exp()).detach().numpy()
        for t, name in enumerate("wlp"):
            found[f"{name}w"].append(cosines[t, 0])
            found[f"{name}l"].append(cosines[t, 1])
    return {name: np.array(values) for name, values in found.items()}


def test_conflict_with_a_clip_model_of_the_real_class(
    tmp_path: Path, rows: list[dict[str, Any]], root: Path, clip: Path
) -> None:
    found = write_captions_report(root / "hybrid", tmp_path / "clip.html", clip=str(clip))["conflict"]
    decided = [row for row in rows if sides(row)]
    by_hand = cosines_by_transformers(clip, decided)
    assert found["pairs"] == found["of"] == len(decided)
    for name, key in (
        ("winner_own", "ww"),
        ("winner_other", "wl"),
        ("loser_own", "ll"),
        ("prompt_loser", "pl"),
    ):
        assert found["similarity"][name]["mean"] == pytest.approx(by_hand[key].mean(), abs=1e-5)
    prompts = [row["caption"] for row in decided]
    wrong = {"winner": by_hand["wl"] - by_hand["ww"], "loser": by_hand["lw"] - by_hand["ll"]}
    shares = {}
    for name, excess in wrong.items():
        scores = np.where(abs(excess) <= 1e-6, 0.5, excess > 0)
        shares[name] = np.mean([scores[[p == q for q in prompts]].mean() for p in set(prompts)])
        assert found[name]["value"] == pytest.approx(shares[name])
    assert found["conflict"]["value"] == pytest.approx((shares["winner"] + shares["loser"]) / 2)
    low, high = found["conflict"]["interval"]
    assert low < found["conflict"]["value"] < high
    assert found["units"] == len(set(prompts)) < len(decided)
    page = (tmp_path / "clip.html").read_text()
    assert 'id="conflict"' in page
    assert Page(page).open == []


def test_one_caption_for_both_images_has_a_conflict_of_one_half(
    tmp_path: Path, rows: list[dict[str, Any]], clip: Path
) -> None:
    same = [{**row, "caption_0": row["caption"], "caption_1": row["caption"]} for row in rows[:20]]
    folder = write_captions(tmp_path / "same", same)
    found = write_captions_report(folder, tmp_path / "same.html", clip=str(clip), clip_pairs=8)
    assert found["conflict"]["pairs"] == 8
    assert found["conflict"]["conflict"]["value"] == 0.5
    assert found["equal"]["share"] == found["near_duplicates"]["share"] == 1.0
    assert any("the same or nearly so" in note for note in found["notes"])


def test_undecodable_images_are_left_out_of_conflict(
    tmp_path: Path, rows: list[dict[str, Any]], clip: Path
) -> None:
    some = [{**row} for row in rows if sides(row)][:6]
    some[0]["jpg_1"] = b""
    folder = write_captions(tmp_path / "bad", some)
    found = write_captions_report(folder, tmp_path / "bad.html", clip=str(clip))["conflict"]
    assert (found["pairs"], found["undecodable"]) == (5, 1)


def test_perturbed_prompts(tmp_path: Path) -> None:
    rows = tiny_rows("perturbation", 20, level="weak")
    found = write_captions_report(write_captions(tmp_path / "p", rows), tmp_path / "p.html")
    assert found["method"] == "perturbation"
    assert list(found["unchanged"]["levels"]) == ["weak"]
    assert {entry["source"] for entry in found["provenance"]} == {"prompt", "perturber"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "r.html"], "no pairs at nowhere"),
        (["{root}/hybrid", "--out", "r.txt"], "--out must end in .html"),
        (["{root}/hybrid/part-00000.parquet"], "no folder to put the report in"),
        (["{root}/hybrd"], "no pairs at"),
        (["{root}/hybrid", "--device", "cpu"], "--device without effect"),
        (["{root}/hybrid", "--clip-pairs", "5"], "--clip-pairs without effect"),
        (["{root}/hybrid", "--clip", "{root}/hybrid"], "cannot load the CLIP model"),
        (["{root}/hybrid", "--tokenizer", "{root}/hybrid"], "cannot load the tokenizer"),
        (["{root}/hybrid", "--columns.caption_0", "nix", "--out", "r.html"], "no column 'nix'"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(
    arguments: list[str],
    message: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted((root / "hybrid").iterdir())
    assert main(["caption-report", *(part.format(root=root) for part in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert sorted((root / "hybrid").iterdir()) == before


def test_no_captions_at_all(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    empty = [{**row, "caption_0": "", "caption_1": None} for row in rows[:3]]
    folder = write_captions(tmp_path / "empty", empty, tokens=False)
    with pytest.raises(UserError, match=r"no row of .* has two captions"):
        write_captions_report(folder, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_the_command_writes_into_the_folder(root: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    folder = write_captions(tmp_path / "few", rows[:5])
    assert main(["caption-report", str(folder)]) == 0
    assert (folder / "captions-report.html").is_file()
    assert json.loads((folder / "captions-report.json").read_text())["rows"] == 5
