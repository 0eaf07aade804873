"""What `diffpref caption` writes: whose caption is what, where it comes from, and in which bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.captions import OracleCaptioner, Perturbed, Provenance, RulePerturber
from diffpref.captions.build import CaptionOptions, caption
from diffpref.data.pairs import open_pairs
from diffpref.engine import Engine
from diffpref.paths import TINY_ASSETS
from diffpref.tiny.oracle import judge
from tests.caption_backends import ColourCaptioner, asked, write_pairs
from tests.pair_files import BLUE, RED, row, write

TINY = "tiny:pairs/train.parquet"
BATCHES = {"small": 3, "odd": 7, "whole": 100}


def run(pairs, out, method="perturbation", **options):
    """(report, rows of all parts in order)."""
    if method != "captioning":
        options.setdefault("perturber", RulePerturber())
    if method != "perturbation":
        options.setdefault("captioner", ColourCaptioner())
    report = caption(str(pairs), out, CaptionOptions(method=method, **options), io.StringIO())
    assert report is not None
    assert report["rows"] == report["kept"] + report["failed"]
    assert sum(report["captions"].values()) == 2 * report["kept"]
    return report, [r for path in sorted(out.glob("part-*.parquet")) for r in pq.read_table(path).to_pylist()]


def parts(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*.parquet"))}


def loser(row):
    return None if row["label_0"] == 0.5 or not row.get("has_label", True) else int(row["label_0"])


def test_perturbation_keeps_the_winner_s_prompt_and_perturbs_the_loser_s(tmp_path):
    perturber = RulePerturber("strong", 5)
    report, rows = run(TINY, tmp_path, perturber=perturber, limit=300, replace=True)
    expected = perturber([r["caption"] for r in rows], range(300))
    ties = 0
    for n, found in enumerate(rows):
        lost = loser(found)
        for side in (0, 1):
            origin = found[f"origin_{side}"]
            if side == lost:
                assert found[f"caption_{side}"] == expected[n].text != found["caption"]
                assert origin == {
                    "source": "perturber", "captioner": None, "changed": True, "before": None,
                    "perturber": {"backend": "rules", "model": "", "revision": "2", "template": "",
                                  "level": "strong", "seed": 5},
                }  # fmt: skip
            else:
                assert found[f"caption_{side}"] == found["caption"]
                assert (origin["source"], origin["perturber"], origin["changed"]) == ("prompt", None, None)
        ties += lost is None
    assert ties == report["without_preference"] > 0
    assert (report["perturbed"], report["unchanged"]) == (300 - ties, 0)
    assert report["captions"] == {"perturber": 300 - ties, "prompt": 300 + ties}


def test_captioning_describes_both_images_of_every_pair(tmp_path):
    report, rows = run(TINY, tmp_path, "captioning", captioner=OracleCaptioner(), limit=40, replace=True)
    for found in rows:
        for side in (0, 1):
            image = io.BytesIO(found[f"jpg_{side}"])
            from PIL import Image

            assert found[f"caption_{side}"] == judge(Image.open(image), found["caption"]).caption
            assert found[f"origin_{side}"]["source"] == "captioner"
            assert found[f"origin_{side}"]["captioner"]["backend"] == "oracle"
            assert found[f"origin_{side}"]["perturber"] is None
    assert report["captions"] == {"captioner": 80}


def test_hybrid_perturbs_the_loser_s_own_caption(tmp_path):
    pairs = write_pairs(tmp_path / "p.parquet", 40)
    _, rows = run(pairs, tmp_path / "out", "hybrid", captioner=ColourCaptioner(seed=4))
    captions = ["a red square, seed 4", "a blue square, seed 4"]
    for n, found in enumerate(rows):
        lost = loser(found)
        for side in (0, 1):
            origin = found[f"origin_{side}"]
            assert origin["captioner"] == {
                "backend": "colours", "model": "model-1", "revision": "rev",
                "template": "0123456789abcdef", "seed": 4,
            }  # fmt: skip
            if side == lost:
                (wanted,) = RulePerturber()([captions[side]], [n])
                assert found[f"caption_{side}"] == wanted.text
                assert (origin["source"], origin["before"]) == ("captioner+perturber", captions[side])
            else:
                assert (found[f"caption_{side}"], origin["source"]) == (captions[side], "captioner")
                assert (origin["perturber"], origin["before"]) == (None, None)


def test_views_of_text_and_bytes_are_columns_like_others(tmp_path):
    """What Arrow can write but cannot take rows of, or measure."""
    kinds = {"caption": pa.string_view(), "jpg_0": pa.binary_view(), "jpg_1": pa.binary_view()}
    schema = pa.schema({**kinds, "label_0": pa.int64(), "note": pa.string_view()})
    rows = [row(1, note="x" * n, caption="" if n == 1 else f"{n} red dogs") for n in range(40)]
    source = write(tmp_path / "p.parquet", rows, schema)
    report, found = run(source, tmp_path / "out", "hybrid", max_failed_share=1.0)
    assert (report["rows"], report["kept"]) == (40, 39)
    assert [r["note"] for r in found] == ["x" * n for n in range(40) if n != 1]
    assert pq.read_schema(tmp_path / "out/part-00000.parquet").field("jpg_0").type == pa.binary_view()


def test_every_other_column_stays_as_it_was(tmp_path):
    schema = pa.schema(
        {
            "about": pa.list_(pa.struct({"score": pa.float32(), "who": pa.string()})),
            "kind": pa.dictionary(pa.int8(), pa.string()), "caption": pa.large_string(),
            "jpg_0": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "jpg_1": pa.binary(),
            "label_0": pa.int64(),
        }
    )  # fmt: skip
    rows = [
        row(n % 2, about=[{"score": n, "who": None}] * (n % 3), kind=f"k{n % 4}",
            jpg_0={"bytes": RED + bytes(n), "path": None})
        for n in range(30)
    ]  # fmt: skip
    source = write(tmp_path / "p.parquet", rows, schema, group=8)
    _, found = run(source, tmp_path / "out", "hybrid", rows_per_file=11)
    table = pa.concat_tables(pq.read_table(p) for p in sorted((tmp_path / "out").glob("part-*")))
    before = pq.read_table(source)
    assert table.column_names[: len(schema.names)] == schema.names
    assert table.select(schema.names).to_pylist() == before.to_pylist()
    assert table.schema.field("kind").type == schema.field("kind").type
    assert len(found) == 30


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_bytes_depend_on_neither_batches_nor_row_groups_nor_workers(tmp_path, batch):
    big = write_pairs(tmp_path / "big.parquet", 60, group=60)
    small = write_pairs(tmp_path / "small.parquet", 60, group=batch + 1)
    options = {"rows_per_file": 25, "captioner": ColourCaptioner(), "replace": False}
    run(big, tmp_path / "a", "hybrid", **options)
    run(small, tmp_path / "b", "hybrid", batch=batch, **options)
    assert parts(tmp_path / "a") == parts(tmp_path / "b")


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("engine", [Engine(workers=2), Engine("ray", workers=2)], ids=["processes", "ray"])
def test_other_engines_write_the_same_bytes(tmp_path, engine):
    options = {"captioner": OracleCaptioner(), "limit": 60, "rows_per_file": 16, "replace": True}
    run(TINY, tmp_path / "a", "hybrid", **options)
    report, _ = run(TINY, tmp_path / "b", "hybrid", engine=engine, **options)
    assert len(parts(tmp_path / "a")) == 4
    assert parts(tmp_path / "a") == parts(tmp_path / "b")
    assert report["run"]["captions"] == 120


def test_shards_make_the_parts_of_one_run_together(tmp_path, capsys):
    pairs = write_pairs(tmp_path / "p.parquet", 50)
    run(pairs, tmp_path / "whole", rows_per_file=9)
    options = {"method": "perturbation", "perturber": RulePerturber(), "rows_per_file": 9}
    for index in (2, 0):
        shard = CaptionOptions(**options, shard=(index, 3))
        assert caption(str(pairs), tmp_path / "out", shard, io.StringIO()) is None
    assert "2 parts of others are missing" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    run(pairs, tmp_path / "out", rows_per_file=9, shard=(1, 3))
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_finished_folder_is_not_made_again(tmp_path):
    pairs, calls = write_pairs(tmp_path / "p.parquet", 20), tmp_path / "calls"
    first, _ = run(pairs, tmp_path / "out", "captioning", captioner=ColourCaptioner(str(calls)))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    number = len(asked(calls))
    again, _ = run(pairs, tmp_path / "out", "captioning", captioner=ColourCaptioner(str(calls)))
    assert again == first
    assert len(asked(calls)) == number
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}


def test_what_was_made_of_an_unfinished_part_is_not_asked_for_again(tmp_path):
    """The run ends while it is in its second part; the next goes on there, with batches of another size."""
    pairs, calls = write_pairs(tmp_path / "p.parquet", 40), tmp_path / "calls"
    stopped = StopsAt(str(calls), stop=2 * 30)
    with pytest.raises(KeyboardInterrupt):
        run(pairs, tmp_path / "out", "hybrid", captioner=stopped, rows_per_file=20, batch=4)
    assert len(parts(tmp_path / "out")) == 1
    (kept,) = (tmp_path / "out").glob(".part-00001.captions.jsonl")
    with open(kept, "ab") as stream:
        stream.write(b'[["torn')
    run(pairs, tmp_path / "out", "hybrid", captioner=ColourCaptioner(str(calls)), rows_per_file=20, batch=5)
    rows = [n for call in asked(calls) for n in call]
    assert sorted(set(rows)) == list(range(80))
    twice = {n for n in rows if rows.count(n) > 1}
    assert twice == set(range(2 * 28, 2 * 32))  # the batch of rows 28 to 31, in which it ended
    run(pairs, tmp_path / "whole", "hybrid", rows_per_file=20)
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".part*"))


class StopsAt(ColourCaptioner):
    def __init__(self, calls: str, stop: int) -> None:
        super().__init__(calls)
        object.__setattr__(self, "stop", stop)

    def __call__(self, images, prompts, rows):
        found = super().__call__(images, prompts, rows)
        if self.stop in rows:
            raise KeyboardInterrupt
        return found


def test_rows_that_fail_are_left_out_counted_and_named(tmp_path):
    rows = [row(n % 2, caption=f"prompt {n}") for n in range(30)]
    rows[3]["caption"] = None
    rows[9]["caption"] = " \n "
    rows[12]["jpg_1"] = BLUE[:40]
    rows[20]["caption"] = "refused prompt"
    pairs = write(tmp_path / "p.parquet", rows)
    captioner = ColourCaptioner(refuses="refused prompt")
    options = {"captioner": captioner, "max_failed_share": 0.2, "rows_per_file": 7}
    report, found = run(pairs, tmp_path / "out", "hybrid", **options)
    assert [r["caption"] for r in found] == [f"prompt {n}" for n in range(30) if n not in (3, 9, 12, 20)]
    assert report["dropped"] == {
        "no_prompt": 2,
        "bad_image": 1,
        "captioner": 1,
        "perturber": 0,
        "unreadable_answer": 0,
    }
    assert [(bad["row"], bad["reason"]) for bad in report["bad_rows"]] == [
        ("p.parquet row 3", "no_prompt"), ("p.parquet row 9", "no_prompt"),
        ("p.parquet row 12", "bad_image"), ("p.parquet row 20", "captioner"),
    ]  # fmt: skip
    assert report["bad_rows"][2]["detail"].startswith("jpg_1: ")
    assert report["bad_rows"][3]["detail"] == "image 0: refused"
    assert len(open_pairs(str(tmp_path / "out"), captions="dual")) == 26


class Half:
    """Fails on odd rows, and gives blank text or the caption itself on some even ones."""

    level, seed = "weak", 0

    def __call__(self, captions, rows):
        return [self._one(text, n) for text, n in zip(captions, rows, strict=True)]

    def _one(self, text, n):
        if n % 2:
            return Perturbed(text, False, failure="too long")
        return Perturbed(" ", True) if n % 4 == 0 else Perturbed(text, False)

    def provenance(self):
        return Provenance("half", level="weak")


@pytest.mark.filterwarnings("ignore")
def test_what_the_perturber_fails_on_is_left_out_and_what_it_returns_unchanged_is_counted(tmp_path):
    pairs = write(tmp_path / "p.parquet", [row(1.0) for _ in range(8)])
    half = dataclass_of(Half)
    report, rows = run(pairs, tmp_path / "out", perturber=half, max_failed_share=1.0)
    assert report["dropped"]["perturber"] == 6
    assert [bad["detail"] for bad in report["bad_rows"][:2]] == ["the caption is blank", "too long"]
    assert (len(rows), report["perturbed"], report["unchanged"]) == (2, 2, 2)
    assert [r["origin_1"]["changed"] for r in rows] == [False, False]


def dataclass_of(kind):
    from dataclasses import dataclass

    return dataclass(frozen=True)(kind)()


def test_tokens_are_those_of_the_tokenizer_and_null_without_one(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(TINY_ASSETS / "model" / "tokenizer")
    long = " ".join(["square"] * 100)
    rows = [row(1.0, caption="a red circle"), row(0.5, caption=long), row(0.5, caption="square")]
    pairs = write(tmp_path / "p.parquet", rows)
    report, found = run(pairs, tmp_path / "out", tokenizer="tiny:model")
    lengths = [[r["tokens_0"], r["tokens_1"]] for r in found]
    assert lengths == [[len(tokenizer(r[f"caption_{side}"]).input_ids) for side in (0, 1)] for r in found]
    assert lengths[1] == [102, 102]  # 100 words, BOS and EOS
    flat = sorted(n for both in lengths for n in both)
    assert report["tokens"] == {"min": flat[0], "median": flat[2], "max": 102, "limit": 77, "cut": 2}
    report, found = run(pairs, tmp_path / "none")
    assert report["tokens"] is None
    assert [r["tokens_0"] for r in found] == [None] * 3


def test_new_captions_replace_old_ones_when_asked(tmp_path):
    pairs = write(
        tmp_path / "p.parquet",
        [row(1.0, caption_0="old", caption_1="old", tokens_0="text", left="x") for _ in range(3)],
    )
    _, rows = run(pairs, tmp_path / "out", replace=True)
    assert {r["caption_0"] for r in rows} == {"a prompt"}
    assert list(rows[0]) == [
        "caption", "jpg_0", "jpg_1", "label_0", "left", "caption_0", "caption_1", "tokens_0", "tokens_1",
        "origin_0", "origin_1",
    ]  # fmt: skip
    assert rows[0]["tokens_0"] is None


def test_other_column_names_are_read_and_written(tmp_path):
    from diffpref.config import ColumnsConfig

    rows = [{"prompt": "a red dog", "left": RED, "right": BLUE, "won": 1}]
    pairs = write(tmp_path / "p.parquet", rows)
    columns = ColumnsConfig(
        caption="prompt", image_0="left", image_1="right", label_0="won", caption_0="text_l",
        caption_1="text_r",
    )  # fmt: skip
    _, found = run(pairs, tmp_path / "out", "hybrid", columns=columns)
    assert found[0]["text_l"] == "a red square, seed 0"
    assert found[0]["text_r"] != "a blue square, seed 0"
    assert "caption_0" not in found[0]


def test_settings_and_manifest_name_what_was_done(tmp_path):
    pairs = write_pairs(tmp_path / "p.parquet", 10)
    run(pairs, tmp_path / "out", "hybrid", perturber=RulePerturber("weak", 9))
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["method"] == "hybrid"
    assert (settings["perturber"], settings["perturber.level"], settings["perturber.seed"]) == (
        "rules", "weak", 9,
    )  # fmt: skip
    assert settings["captioner.revision"] == "rev"
    assert "captioner.device" not in settings
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["key"] == settings
