"""Every way a user's pairs can be unusable: one clear message with the file, the row and the way out."""

from __future__ import annotations

import io
import math
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.cli import main
from diffpref.data.check import check
from diffpref.data.pairs import open_pairs
from diffpref.data.schema import PickAPicColumns, find_files
from diffpref.errors import UserError
from tests.pair_files import BLUE, RED, image_bytes, row, write


def message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        open_pairs(*args, **kwargs)
    return str(caught.value)


def load_message(path, rows, **kwargs) -> str:
    table = open_pairs(write(path / "a.parquet", rows), **kwargs)
    with pytest.raises(UserError) as caught:
        list(map(table.load, range(len(table))))
    return str(caught.value)


def test_nothing_there(tmp_path):
    assert "no pairs at" in message(tmp_path / "nowhere.parquet")
    assert "no pairs at" in message(tmp_path / "*.parquet")


def test_a_folder_without_parquet_says_what_it_holds(tmp_path):
    (tmp_path / "readme.txt").write_text("hi")
    assert "readme.txt" in message(tmp_path)


def test_a_folder_that_mixes_splits(tmp_path):
    write(tmp_path / "train-00000.parquet", [row()])
    write(tmp_path / "validation-00000.parquet", [row()])
    text = message(tmp_path)
    assert "train, validation" in text
    assert "train*.parquet" in text
    assert len(open_pairs(tmp_path / "train*.parquet")) == 1


@pytest.mark.parametrize("content", [b"", b"PAR1", b"caption,jpg_0\na,b\n", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_that_is_not_parquet(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    assert f"{path} cannot be read as Parquet" in message(path)


def test_a_truncated_parquet_file(tmp_path):
    path = write(tmp_path / "a.parquet", [row()] * 10)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read as Parquet" in message(path)


def test_a_missing_column_names_the_nearest_and_the_option(tmp_path):
    rows = [{"captions" if k == "caption" else k: v for k, v in row().items()}]
    text = message(write(tmp_path / "a.parquet", rows))
    assert "no column 'caption'" in text
    assert "captions, jpg_0, jpg_1, label_0" in text
    assert "--data.columns.caption captions" in text


def test_the_glob_for_one_split_is_one_that_works(tmp_path):
    folder = tmp_path / "pairs [v2]"
    folder.mkdir()
    for name in ("train", "test"):
        write(folder / f"{name}-0.parquet", [row()])
    (named,) = re.findall("for example '(.+)'", message(folder))
    assert find_files(named) == [folder / "test-0.parquet"]


def test_check_names_options_that_it_has(tmp_path, capsys):
    source = write(tmp_path / "a.parquet", [{"captions": "p", **row()}])
    assert main(["check", str(source), "--columns.caption", "captons"]) == 2
    assert "with --columns.caption captions" in capsys.readouterr().err
    pq.write_table(pq.read_table(source).slice(0, 0), tmp_path / "empty.parquet")
    for place in (tmp_path / "none*.parquet", tmp_path / "empty.parquet"):
        assert main(["check", str(place)]) == 2
        assert "--data." not in capsys.readouterr().err


def test_dual_captions_asked_of_data_without_them(tmp_path):
    text = message(write(tmp_path / "a.parquet", [row()]), captions="dual")
    assert "'caption_0' and 'caption_1'" in text
    assert "diffpref caption --pairs" in text


@pytest.mark.parametrize(
    ("change", "named"),
    [({"jpg_0": "a.jpg"}, "jpg_0"), ({"label_0": "1"}, "label_0"), ({"caption": 3}, "caption")],
)
def test_a_column_of_the_wrong_type(tmp_path, change, named):
    assert f"column '{named}'" in message(write(tmp_path / "a.parquet", [row(**change)]))


def test_every_file_of_a_folder_is_checked(tmp_path):
    write(tmp_path / "a.parquet", [row()])
    write(tmp_path / "b.parquet", [{"caption": "x"}])
    assert "b.parquet has no column" in message(tmp_path)


@pytest.mark.parametrize(
    ("label", "why"),
    [
        (math.nan, "null or NaN"),
        (None, "null or NaN"),
        (0.7, "soft labels"),
        (-1.0, "outside"),
        (2.0, "outside"),
    ],
)
def test_a_label_that_is_none_names_file_and_row(tmp_path, label, why):
    path = write(tmp_path / "a.parquet", [row(1.0), row(0.5), row(label)], group=2)
    text = message(path)
    assert f"'label_0' of {path} row 2" in text
    assert why in text


def test_an_integer_label_out_of_range(tmp_path):
    path = write(tmp_path / "a.parquet", [row(1), row(2)])
    assert "row 1" in message(path)


def test_labels_that_contradict_each_other(tmp_path):
    path = write(tmp_path / "a.parquet", [row(1.0, label_1=0.0), row(1.0, label_1=1.0)])
    text = message(path)
    assert f"{path} row 1" in text
    assert "contradict" in text


def test_empty_data(tmp_path):
    schema = pa.schema(
        [("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64())]
    )
    assert "no rows" in message(write(tmp_path / "a.parquet", [], schema))


def test_only_ties(tmp_path):
    text = message(write(tmp_path / "a.parquet", [row(0.5)] * 3))
    assert "no usable pair" in text
    assert "3 ties" in text


def test_null_captions_above_the_allowed_share_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", [row(1.0, caption=None), row(1.0), row(1.0, caption="")])
    text = message(path)
    assert "2 of 3 rows" in text
    assert f"{path} row 0: caption is null or empty; {path} row 2: caption is null or empty" in text
    assert "--data.max_bad_share" in text


def test_null_own_captions_count_with_dual_captions_only(tmp_path):
    path = write(
        tmp_path / "a.parquet", [row(caption_0="x", caption_1="y"), row(caption_0="x", caption_1=None)]
    )
    assert len(open_pairs(path)) == 2
    assert "caption_1 is null or empty" in message(path, captions="dual")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "image is null"),
        (b"", "image has zero bytes"),
        (b"<html>", "not a JPEG, PNG or WEBP image"),
        (image_bytes((1, 2, 3), (64, 64), "JPEG")[:-200], "truncated"),
        (image_bytes((1, 2, 3), (8, 8), "GIF"), "not a JPEG, PNG or WEBP image"),
    ],
)
def test_too_many_bad_images_stop_with_row_and_reason(tmp_path, data, reason):
    text = load_message(tmp_path, [row(1.0), row(1.0, jpg_1=data)])
    assert "1 of 2 rows" in text
    assert f"{tmp_path / 'a.parquet'} row 1: jpg_1: " in text
    assert reason in text


def test_all_images_identical_leaves_nothing(tmp_path):
    assert "no usable pair" in load_message(tmp_path, [row(1.0, jpg_1=RED)] * 3)


def test_all_images_bad_with_any_share_allowed(tmp_path):
    rows = [row(1.0, jpg_0=b"x")] * 3
    assert "no usable pair" in load_message(tmp_path, rows, max_bad_share=1.0)


def test_a_page_damaged_in_the_middle_names_the_row(tmp_path):
    path = write(tmp_path / "a.parquet", [row(1.0, jpg_0=image_bytes((i, 0, 0))) for i in range(50)])
    data = bytearray(path.read_bytes())
    at = data.find(b"IHDR")
    data[at - 400 : at] = bytes(len(data[at - 400 : at]))
    if at < 400:
        data[4:at] = bytes(at - 4)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"row 0 cannot be read|cannot be used|cannot be read"):
        open_pairs(path).load(0)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_bad_share_out_of_range(tmp_path, share):
    assert "max_bad_share" in message(write(tmp_path / "a.parquet", [row()]), max_bad_share=share)


def test_a_caption_mode_that_is_none(tmp_path):
    assert "shared" in message(write(tmp_path / "a.parquet", [row()]), captions="double")


def careless(texts: list[bytes]) -> pa.Array:
    """A text column of any bytes, as writers leave it that do not look."""
    return pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())


@pytest.mark.parametrize("captions", ["shared", "dual"])
def test_captions_that_are_not_utf8_are_bad_rows(tmp_path, captions):
    column = "caption" if captions == "shared" else "caption_1"
    columns = {name: [f"{name} {i}" for i in range(3)] for name in ("caption", "caption_0", "caption_1")}
    columns |= {column: careless([b"good", b"b\xff", b"fine"])}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({**columns, "jpg_0": [RED] * 3, "jpg_1": [BLUE] * 3, "label_0": [1.0] * 3}), path)
    table = open_pairs(path, captions=captions, max_bad_share=0.5)
    assert [loser for _, loser in table.iter_captions()] == ["good", "fine"]
    assert f"{path} row 1: {column} is not UTF-8" in message(path, captions=captions)


def test_a_column_that_is_there_twice(tmp_path):
    path = tmp_path / "a.parquet"
    arrays = [pa.array(values) for values in (["p"], ["q"], [RED], [BLUE], [1.0])]
    names = ["caption", "caption", "jpg_0", "jpg_1", "label_0"]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), path)
    assert f"{path} has the column 'caption' twice" in message(path)


@pytest.mark.parametrize(("name", "value"), [("has_label", "yes"), ("label_1", [0])])
def test_a_column_about_labels_of_the_wrong_type(tmp_path, name, value):
    assert f"column '{name}' of" in message(write(tmp_path / "a.parquet", [row(**{name: value})]))


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_damage_anywhere_is_a_users_mistake(tmp_path, compression):
    """Sixty files with twenty bytes changed at random: each opens and loads, or is refused."""
    whole, path = tmp_path / "whole.parquet", tmp_path / "a.parquet"
    columns = {"caption": [f"pé{i}" for i in range(60)], "jpg_1": [BLUE] * 60, "label_0": [1.0] * 60}
    columns |= {"jpg_0": [image_bytes((i, 0, 1)) for i in range(60)]}
    pq.write_table(pa.table(columns), whole, row_group_size=20, compression=compression, use_dictionary=False)
    refused = 0
    for seed in range(60):
        draw, data = random.Random(seed), bytearray(whole.read_bytes())
        for _ in range(20):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            table = open_pairs(path, max_bad_share=1.0)
            for index in range(len(table)):
                table.try_load(index)
            assert len(list(table.iter_captions())) == len(table)
        except UserError:
            refused += 1
    assert 10 < refused <= 60


def test_check_counts_everything_and_lists_bad_rows(tmp_path):
    rows = [
        row(1.0, caption="ab"),
        row(1.0, caption="ab"),
        row(0.0, caption="abcdef", jpg_0=image_bytes((9, 9, 9), (32, 16))),
        row(0.5),
        row(0.0, has_label=False),
        row(1.0, jpg_1=RED),
        row(1.0, jpg_1=b"junk"),
        row(1.0, caption=None),
    ]
    rows = [{"has_label": True} | r for r in rows]
    path = write(tmp_path / "a.parquet", rows)
    out = io.StringIO()
    report = check(path, out=out)
    stats = report.stats
    assert (stats.rows, report.kept, stats.ties, stats.unlabelled) == (8, 3, 1, 1)
    assert (stats.identical, stats.bad) == (1, 2)
    assert report.prompts == 3  # "ab", "abcdef" and the default of the two unusable images
    assert report.sizes == {(16, 16): 5, (32, 16): 1}
    assert report.caption_lengths == {2: 2, 6: 1, 8: 2}
    text = out.getvalue()
    assert f"{path} row 6: jpg_1: bytes are not a JPEG, PNG or WEBP image" in text
    assert f"{path} row 7: caption is null or empty" in text
    assert re.search(r"image 0 preferred +4 \(80\.0%\)", text)


def test_check_of_unusable_data_is_a_user_error(tmp_path):
    out = io.StringIO()
    with pytest.raises(UserError, match="no usable pair"):
        check(write(tmp_path / "a.parquet", [row(1.0, jpg_0=b"x")]), PickAPicColumns(), out=out)
    assert "row 0: jpg_0: bytes are not" in out.getvalue()


def test_blank_captions_are_not_taken_for_missing_labels(tmp_path):
    """Spaces, and characters that nobody sees."""
    captions = ["  ", "\u200b\u200d", "\t\n"]
    source = write(tmp_path / "a.parquet", [{**row(), "caption": caption} for caption in captions])
    with pytest.raises(UserError, match="no usable pair") as caught:
        open_pairs(str(source), max_bad_share=1.0)
    assert "3 bad" in caught.value.why
    assert "caption" in caught.value.why
    assert "label" not in caught.value.fix
