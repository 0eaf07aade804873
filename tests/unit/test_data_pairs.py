"""Tables of preference pairs: labels, captions, files, replacements, and reading in bounded memory."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpref.data.pairs import IDENTICAL, open_pairs
from diffpref.data.reader import BATCH, RowReader
from diffpref.data.schema import PickAPicColumns, open_file
from tests.miniatures import rows
from tests.pair_files import BLUE, RED, colour, image_bytes, row, write

CAPTIONED = {"caption_0": "it is red", "caption_1": "it is blue"}


def test_label_1_means_that_image_0_won_and_0_that_image_1_did(tmp_path):
    table = open_pairs(write(tmp_path / "a.parquet", [row(1.0), row(0.0)]))
    first, second = table.load(0), table.load(1)
    assert (colour(first.winner_image), colour(first.loser_image)) == ((255, 0, 0), (0, 0, 255))
    assert (colour(second.winner_image), colour(second.loser_image)) == ((0, 0, 255), (255, 0, 0))
    assert first.winner_caption == first.loser_caption == "a prompt"


def test_dual_captions_go_with_their_images(tmp_path):
    path = write(tmp_path / "a.parquet", [row(1.0, **CAPTIONED), row(0.0, **CAPTIONED)])
    table = open_pairs(path, captions="dual")
    assert [(p.winner_caption, p.loser_caption) for p in map(table.load, range(2))] == [
        ("it is red", "it is blue"),
        ("it is blue", "it is red"),
    ]
    assert list(table.iter_captions()) == [("it is red", "it is blue"), ("it is blue", "it is red")]
    assert list(table.iter_captions(1)) == [("it is blue", "it is red")]


def test_swapping_a_pair_swaps_its_captions_too(tmp_path):
    pair = open_pairs(write(tmp_path / "a.parquet", [row(1.0, **CAPTIONED)]), captions="dual").load(0)
    swapped = pair.swapped()
    assert (swapped.winner_caption, swapped.loser_caption) == ("it is blue", "it is red")
    assert colour(swapped.winner_image) == (0, 0, 255)
    assert swapped.swapped() == pair


@pytest.mark.parametrize(
    ("kind", "values"),
    [(pa.int64(), [1, 0]), (pa.int8(), [1, 0]), (pa.float32(), [1.0, 0.0]), (pa.bool_(), [True, False])],
)
def test_labels_of_any_number_type(tmp_path, kind, values):
    table = pa.Table.from_pylist([row(1.0), row(0.0)]).set_column(3, "label_0", pa.array(values, kind))
    pq.write_table(table, tmp_path / "a.parquet")
    pairs = open_pairs(tmp_path / "a.parquet")
    assert colour(pairs.load(0).winner_image) == (255, 0, 0)
    assert colour(pairs.load(1).winner_image) == (0, 0, 255)


def test_ties_and_unlabelled_rows_are_dropped_and_counted(tmp_path):
    rows = [
        row(0.5, has_label=True),
        row(1.0, has_label=True),
        row(0.0, has_label=False),
        row(None, has_label=None),
        row(0.0, has_label=True),
        row(0.5, has_label=True),
    ]
    table = open_pairs(write(tmp_path / "a.parquet", rows))
    assert len(table) == 2
    assert [table.source(i).rpartition(" ")[2] for i in range(2)] == ["1", "4"]
    assert (table.stats.rows, table.stats.ties, table.stats.unlabelled, table.stats.kept) == (6, 2, 2, 2)


def test_several_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b", "c", "a"):
        write(tmp_path / f"{name}.parquet", [row(1.0, caption=f"{name}{i}") for i in range(3)], group=2)
    for spec in (tmp_path, tmp_path / "*.parquet"):
        table = open_pairs(spec)
        assert [w for w, _ in table.iter_captions()] == [f"{n}{i}" for n in "abc" for i in range(3)]
        assert table.load(5).winner_caption == "b2"
        assert table.source(5) == f"{tmp_path / 'b.parquet'} row 2"


def test_ids_are_a_stable_hash_of_file_index_and_row(tmp_path):
    write(tmp_path / "a.parquet", [row(0.5), row(1.0)])
    write(tmp_path / "b.parquet", [row(1.0)])
    table = open_pairs(tmp_path)
    digest = hashlib.blake2b(b"0:1", digest_size=8).digest()
    assert table.pair_id(0) == int.from_bytes(digest, "little") % 2**63 == table.load(0).id
    assert table.pair_id(1) != table.pair_id(0)


def test_huggingface_image_structs_are_read(tmp_path):
    cell = {"bytes": RED, "path": "a.png"}
    table = open_pairs(write(tmp_path / "a.parquet", [row(1.0, jpg_0=cell, jpg_1=cell | {"bytes": BLUE})]))
    assert colour(table.load(0).loser_image) == (0, 0, 255)


def test_column_names_are_configurable(tmp_path):
    renamed = {"text": "hi", "img_a": RED, "img_b": BLUE, "won": 0}
    columns = PickAPicColumns(caption="text", image_0="img_a", image_1="img_b", label_0="won")
    pair = open_pairs(write(tmp_path / "a.parquet", [renamed]), columns).load(0)
    assert (colour(pair.winner_image), pair.winner_caption) == ((0, 0, 255), "hi")


def test_a_bad_pair_is_replaced_by_the_next_good_one_whatever_the_order_of_reading(tmp_path):
    rows = [row(1.0, caption=f"p{i}") for i in range(6)]
    rows[1]["jpg_1"] = b"not an image"
    rows[2]["jpg_0"] = b""
    rows[5]["jpg_0"] = RED[:40]
    path = write(tmp_path / "a.parquet", rows)
    expected = ["p0", "p3", "p3", "p3", "p4", "p0"]
    for order in (range(6), reversed(range(6)), [5, 1, 1, 2, 0, 3, 4]):
        table = open_pairs(path, max_bad_share=0.5)
        found = {i: table.load(i) for i in order}
        assert [found[i].winner_caption for i in range(6)] == expected
        assert found[1].id == found[3].id == table.pair_id(3)
        assert table.stats.bad == 3
        assert {bad.source for bad in table.stats.first_bad} == {f"{path} row {i}" for i in (1, 2, 5)}
    assert table.problem(2) == "jpg_0: image has zero bytes"
    assert table.problem(1).startswith("jpg_1: bytes are not")
    assert table.problem(3) == ""


def test_identical_images_are_passed_over_and_are_not_bad_rows(tmp_path):
    rows = [row(1.0, jpg_1=RED), row(1.0, caption="good")]
    table = open_pairs(write(tmp_path / "a.parquet", rows), max_bad_share=0.0)
    assert table.load(0).winner_caption == "good"
    assert (table.stats.identical, table.stats.bad) == (1, 0)
    assert table.problem(0) == IDENTICAL
    assert table.try_load(0) is None
    assert table.stats.identical == 1


def test_bad_captions_within_the_allowed_share_are_left_out_and_named(tmp_path):
    rows = [row(1.0, caption=f"p{i}") for i in range(10)]
    rows[3]["caption"] = None
    rows[7]["caption"] = " \n"
    path = write(tmp_path / "a.parquet", rows)
    table = open_pairs(path, max_bad_share=0.2)
    assert [w for w, _ in table.iter_captions()] == [f"p{i}" for i in range(10) if i not in (3, 7)]
    assert [bad.source for bad in table.stats.first_bad] == [f"{path} row 3", f"{path} row 7"]


def test_a_tie_with_a_null_caption_is_a_tie_not_a_bad_row(tmp_path):
    table = open_pairs(write(tmp_path / "a.parquet", [row(0.5, caption=None), row(1.0)]), max_bad_share=0.0)
    assert (table.stats.ties, table.stats.bad) == (1, 0)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3 * BATCH), min_size=1, max_size=3),
    group=st.integers(1, 2 * BATCH),
    picks=st.lists(st.integers(0, 10**6), max_size=40),
)
def test_any_row_is_found_in_any_order_over_files_groups_and_batches(tmp_path_factory, sizes, group, picks):
    folder = tmp_path_factory.mktemp("rows")
    number, files = 0, []
    for i, size in enumerate(sizes):
        path = write(folder / f"{i}.parquet", [{"n": number + k} for k in range(size)], group=group)
        files.append(open_file(path))
        number += size
    reader = RowReader(files)
    for pick in picks:
        assert reader.read(pick % number, ["n"]) == {"n": pick % number}


def test_only_a_few_pages_are_held_however_large_the_row_group(tmp_path):
    """One compressed row group of 82 MB, as some writers make: pages of 1,024 rows are 10 MB."""
    path, count = tmp_path / "a.parquet", 8192
    pq.write_table(pa.table({"x": pa.array([i.to_bytes(4, "big") * 2500 for i in range(count)])}), path)
    assert pq.read_metadata(path).num_row_groups == 1
    reader = RowReader([open_file(path)])
    before, peak = pa.total_allocated_bytes(), 0
    for i in range(count):
        assert reader.read(i, ["x"])["x"][:4] == i.to_bytes(4, "big")
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 25e6


def test_opening_reads_no_image(tmp_path):
    """The image columns' pages are wiped from the file: labels and captions still open."""
    path = write(tmp_path / "a.parquet", [row(1.0, caption=f"p{i}") for i in range(50)])
    metadata = pq.read_metadata(path).row_group(0)
    data = bytearray(path.read_bytes())
    for i in range(metadata.num_columns):
        column = metadata.column(i)
        if column.path_in_schema.startswith("jpg"):
            start = column.dictionary_page_offset or column.data_page_offset
            data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    assert len(open_pairs(path)) == 50


def test_a_table_travels_to_worker_processes(tmp_path):
    table = open_pairs(write(tmp_path / "a.parquet", [row(1.0, caption=f"p{i}") for i in range(5)]))
    table.load(2)
    copy = pickle.loads(pickle.dumps(table))
    assert copy.load(4).winner_caption == "p4"
    assert copy.stats == table.stats


def test_input_files_are_never_changed(tmp_path):
    path = write(tmp_path / "a.parquet", [row(1.0), row(1.0, jpg_0=b"junk")])
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    open_pairs(path, max_bad_share=1.0).load(1)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_an_index_outside_the_table_is_an_index_error(tmp_path):
    table = open_pairs(write(tmp_path / "a.parquet", [row(1.0)]))
    for index in (-1, 1):
        with pytest.raises(IndexError):
            table.try_load(index)


def test_defaults_are_pick_a_pics_columns():
    assert dataclasses.astuple(PickAPicColumns()) == (
        "caption", "jpg_0", "jpg_1", "label_0", "caption_0", "caption_1",
    )  # fmt: skip
    assert image_bytes((0, 0, 0)) != RED


def test_the_first_usable_pairs_can_be_asked_for(tmp_path):
    """Ties before them do not count."""
    path = write(tmp_path / "a.parquet", [row(label_0=0.5), *(row(label_0=1.0) for _ in range(4))])
    table = open_pairs(path, max_pairs=2)
    assert len(table) == 2
    assert [table.source(index) for index in range(2)] == [f"{path} row 1", f"{path} row 2"]
    assert table.stats.rows == 5
    assert len(open_pairs(path, max_pairs=9)) == 4


def test_a_file_is_opened_once_however_many_row_groups_it_has(tmp_path, monkeypatch):
    """Each opening parses a footer that names all row groups: once a group is quadratic."""
    opened = []
    real = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    counts = {}
    for groups in (4, 40):
        path = tmp_path / f"{groups}.parquet"
        pq.write_table(pa.Table.from_pylist(rows(40)), path, row_group_size=40 // groups)
        table = open_pairs(str(path))
        opened.clear()
        assert all(table.try_load(index) is not None for index in range(len(table)))
        assert len(list(table.iter_captions())) == len(table)
        counts[groups] = len(opened)
    assert counts[4] == counts[40] == 2  # one for the pairs, one for the captions


@pytest.mark.parametrize("captions", ["shared", "dual"])
@pytest.mark.parametrize("start", [0, 1, 7, 11, 12, 30])
def test_streamed_captions_and_ids_are_those_of_the_pairs(tmp_path, captions, start):
    """Two files with ties and blank captions between, read from any pair on."""
    for number in range(2):
        part = rows(20, first=20 * number)
        for k in (0, 3, 4, 19):
            part[k]["label_0"] = 0.5
        part[9]["caption"] = part[9]["caption_0"] = " "
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"{number}.parquet", row_group_size=3)
    table = open_pairs(str(tmp_path), captions=captions, max_bad_share=0.2)
    assert len(table) == 30
    pairs = [table.load(index) for index in range(len(table))]
    expected = [(pair.winner_caption, pair.loser_caption) for pair in pairs]
    assert list(table.iter_captions(start)) == expected[start:]
    assert table.pair_ids() == [pair.id for pair in pairs] == [table.pair_id(k) for k in range(30)]
