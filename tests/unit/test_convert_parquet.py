"""Pick-a-Pic and its relatives: every kind of bad row, counts made by hand."""

from __future__ import annotations

import io
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffpref.data.check import check
from diffpref.data.pairs import open_pairs
from tests.convert_files import (
    GREEN,
    RED_AGAIN,
    diffpref,
    dropped,
    error,
    run,
)
from tests.pair_files import BLUE, RED, colour, image_bytes, row, write


def test_pick_a_pic(tmp_path):
    rows = [
        row(1.0, label_1=0.0, has_label=True, model_0="a", ranking_id=7),
        row(0.0, label_1=1.0, has_label=True, caption="other", jpg_0=GREEN),
        row(0.5, label_1=0.5, has_label=True),
        row(1.0, label_1=0.0, has_label=False),
        row(1.0, label_1=1.0, has_label=True),
    ]
    source = write(tmp_path / "train.parquet", rows)
    before = source.read_bytes()
    report, kept = run(source, tmp_path / "out")
    assert (report["rows"], report["kept"]) == (5, 2)
    assert dropped(report) == {"tie": 1, "no_label": 1, "bad_label": 1}
    assert report["labels"] == {"image_0_preferred": 1, "image_1_preferred": 1, "ties": 0}
    assert report["distinct_prompts"] == 2
    assert report["resolutions"] == {"16x16": 3, "32x16": 1}
    assert report["bad"] == 1
    assert [(bad["row"], bad["reason"]) for bad in report["bad_rows"]] == [
        ("train.parquet row 3", "no_label"), ("train.parquet row 4", "bad_label"),
    ]  # fmt: skip
    assert [(r["caption"], r["label_0"], r["source_row"], r["model_0"]) for r in kept] == [
        ("a prompt", 1.0, 0, "a"), ("other", 0.0, 1, None),
    ]  # fmt: skip
    assert (kept[0]["jpg_0"], kept[0]["jpg_1"], kept[1]["jpg_0"]) == (RED, BLUE, GREEN)
    assert source.read_bytes() == before
    schema = pq.read_schema(tmp_path / "out/part-00000.parquet")
    assert schema.field("label_0").type == pa.float32()
    assert "caption_0" not in schema.names


def test_the_result_opens_and_checks(tmp_path):
    rows = [row(float(i % 2), caption=f"p{i}") for i in range(7)] + [row(1.0, jpg_0=b"x")] * 2
    report, _ = run(write(tmp_path / "a.parquet", rows), tmp_path / "out", rows_per_file=2)
    table = open_pairs(tmp_path / "out", max_bad_share=0.0)
    assert len(table) == report["kept"] == 7
    assert colour(table.load(0).winner_image) == (0, 0, 255)  # label 0: image 1, the blue one
    assert colour(table.load(1).winner_image) == (255, 0, 0)
    assert pq.read_table(tmp_path / "out/part-00004.parquet").num_rows == 0  # row 8 alone, a bad one
    checked = check(tmp_path / "out", out=io.StringIO())
    assert (checked.kept, checked.stats.rows) == (7, 7)


@pytest.mark.parametrize("labels", [[1, 0], [True, False], [1.0, 0.0]])
def test_labels_of_every_numeric_type_become_float32(tmp_path, labels):
    _, kept = run(write(tmp_path / "a.parquet", [row(value) for value in labels]), tmp_path / "out")
    assert [r["label_0"] for r in kept] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("label", "reason"),
    [(None, "no_label"), (math.nan, "no_label"), (0.7, "bad_label"), (2.0, "bad_label"), (-1.0, "bad_label"),
     (math.inf, "bad_label")],
)  # fmt: skip
def test_a_label_that_is_none(tmp_path, label, reason):
    report, _ = run(write(tmp_path / "a.parquet", [row(1.0), row(label)]), tmp_path / "out")
    assert dropped(report) == {reason: 1}


def test_kept_ties(tmp_path):
    report, kept = run(write(tmp_path / "a.parquet", [row(1.0), row(0.5)]), tmp_path / "out", keep_ties=True)
    assert [r["label_0"] for r in kept] == [1.0, 0.5]
    assert report["labels"] == {"image_0_preferred": 1, "image_1_preferred": 0, "ties": 1}


def test_double_captions_are_told_from_the_columns_and_both_are_needed(tmp_path):
    rows = [row(caption_0="c0", caption_1="c1"), row(caption_0="c0", caption_1=" ")]
    report, kept = run(write(tmp_path / "a.parquet", rows), tmp_path / "out")
    assert [(r["caption"], r["caption_0"], r["caption_1"]) for r in kept] == [("a prompt", "c0", "c1")]
    assert dropped(report) == {"no_caption": 1}
    assert open_pairs(tmp_path / "out", captions="dual").load(0).loser_caption == "c1"
    report, kept = run(tmp_path / "a.parquet", tmp_path / "shared", format="pick-a-pic")
    assert report["kept"] == 2
    assert "caption_0" not in kept[0]
    text = error(write(tmp_path / "b.parquet", [row()]), tmp_path / "no", format="pick-double-caption")
    assert "no column 'caption_0' and 'caption_1'" in text
    assert "--columns caption_0=NAME" in text


def test_double_captions_under_other_names(tmp_path):
    source = write(tmp_path / "a.parquet", [row(left="c0", right="c1")])
    names = {"caption_0": "left", "caption_1": "right"}
    _, kept = run(source, tmp_path / "out", columns=names)
    assert [(r["caption_0"], r["caption_1"]) for r in kept] == [("c0", "c1")]
    text = error(source, tmp_path / "no", columns=names, format="pick-a-pic")
    assert "--columns caption_0=left caption_1=right has no effect" in text
    assert "no column 'lft'" in error(source, tmp_path / "no", columns=names | {"caption_0": "lft"})


def test_who_drew_the_images_is_kept_whatever_kind_of_text_the_column_is(tmp_path):
    names = {"model_0": pa.array(["a"], pa.large_string()), "model_1": pa.array(["b"]).dictionary_encode()}
    table = pa.table({"caption": ["p"], "jpg_0": [RED], "jpg_1": [BLUE], "label_0": [1.0], **names})
    pq.write_table(table, tmp_path / "a.parquet")
    _, kept = run(tmp_path / "a.parquet", tmp_path / "out")
    assert [(r["model_0"], r["model_1"]) for r in kept] == [("a", "b")]


def test_several_files_nested_image_structs_and_other_names(tmp_path):
    for number, name in enumerate(("b", "a")):
        entry = {
            "text": f"p{number}",
            "left": {"bytes": RED, "path": None},
            "right": {"bytes": BLUE},
            "won": 1,
        }
        write(tmp_path / f"{name}.parquet", [entry])
    names = {"caption": "text", "image_0": "left", "image_1": "right", "label_0": "won"}
    _, kept = run(tmp_path / "*.parquet", tmp_path / "out", columns=names)
    assert [(r["source_file"], r["caption"], r["jpg_0"]) for r in kept] == [
        ("a.parquet", "p1", RED), ("b.parquet", "p0", RED),
    ]  # fmt: skip
    assert "--columns caption=text" in error(
        tmp_path / "a.parquet", tmp_path / "no", columns=names | {"caption": "txt"}
    )
    assert "did you mean caption" in error(tmp_path / "a.parquet", tmp_path / "no", columns={"captoin": "x"})


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"jpg_1": None}, "bad_image", "image 1: image is null"),
        ({"jpg_0": b""}, "bad_image", "image 0: image has zero bytes"),
        ({"jpg_0": b"x"}, "bad_image", "not a JPEG"),
        ({"jpg_0": image_bytes((1, 2, 3), (8, 8), "GIF")}, "bad_image", "not a JPEG"),
        ({"jpg_1": image_bytes((1, 2, 3), (64, 64), "JPEG")[:-200]}, "bad_image", "truncated"),
        ({"jpg_1": RED_AGAIN}, "identical_images", "both images are the same"),
        ({"caption": None}, "no_caption", "caption is null"),
        ({"caption": " \n"}, "no_caption", "caption is null or empty"),
    ],
)
def test_a_bad_row_is_dropped_named_and_stops_nothing(tmp_path, change, reason, detail):
    rows = [row(1.0), row(1.0, **change), row(1.0)]
    report, kept = run(write(tmp_path / "a.parquet", rows), tmp_path / "out")
    assert [r["source_row"] for r in kept] == [0, 2]
    assert dropped(report) == {reason: 1}
    assert report["bad_rows"][0]["row"] == "a.parquet row 1"
    assert detail in report["bad_rows"][0]["detail"]


def test_text_that_is_no_utf8_in_parquet(tmp_path):
    texts = pa.Array.from_buffers(
        pa.string(), 2, pa.array([b"good", b"b\xff"], pa.binary()).buffers()
    )  # what a careless writer leaves
    table = pa.table({"caption": texts, "jpg_0": [RED] * 2, "jpg_1": [BLUE] * 2, "label_0": [1.0, 1.0]})
    pq.write_table(table, tmp_path / "a.parquet")
    report, kept = run(tmp_path / "a.parquet", tmp_path / "out")
    assert dropped(report) == {"malformed_row": 1}
    assert [r["caption"] for r in kept] == ["good"]


def test_images_are_never_encoded_again(tmp_path):
    blobs = [RED, RED_AGAIN] + [image_bytes((255, 0, 0), kind=kind) for kind in ("JPEG", "WEBP")]
    rows = [row(1.0, jpg_0=blob, jpg_1=BLUE) for blob in blobs]
    _, kept = run(write(tmp_path / "a.parquet", rows), tmp_path / "out")
    assert [r["jpg_0"] for r in kept] == blobs
    assert kept[0]["image_0_hash"] == kept[1]["image_0_hash"] != kept[2]["image_0_hash"]
    assert len({r["image_1_hash"] for r in kept}) == 1


def test_the_hash_is_one_of_pixels_and_size(tmp_path):
    """Two grey pixels beside and above each other are two images."""
    wide = Image.new("RGB", (2, 1), (7, 7, 7))
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    blobs = []
    for image in (wide, tall):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        blobs.append(stream.getvalue())
    _, kept = run(write(tmp_path / "a.parquet", [row(jpg_0=blobs[0], jpg_1=blobs[1])]), tmp_path / "out")
    assert kept[0]["image_0_hash"] != kept[0]["image_1_hash"]


def test_a_file_that_is_damaged_in_the_middle_is_one_message(tmp_path):
    """Nothing more on standard error: Arrow's writer of the part under way must not complain at its end."""
    path = tmp_path / "a.parquet"
    rows = [row(jpg_0=image_bytes((i, 0, 1)), caption=f"p{i}") for i in range(200)]
    pq.write_table(
        pa.Table.from_pylist(rows), path, row_group_size=50, compression="none", use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = b"\xff" * 3000  # lengths among them
    path.write_bytes(data)
    done = diffpref(path, "--out", tmp_path / "out", "--rows-per-file", 20)
    assert done.returncode == 2
    assert "a.parquet cannot be read in the row group that starts at row" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob(".*.tmp"))
