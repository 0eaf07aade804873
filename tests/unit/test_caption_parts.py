"""What `diffpref caption` reads and keeps: slices of files, captions of unfinished parts, row groups."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.captions import OracleCaptioner
from diffpref.captions.parts import CaptionWriter
from diffpref.captions.progress import Progress, read_progress
from diffpref.captions.source import SliceReader, open_source
from diffpref.captions.stages import MADE
from diffpref.captions.tally import CaptionTally
from diffpref.data.parts import GROUP_BYTES
from diffpref.data.schema import PickAPicColumns
from tests.caption_backends import write_pairs
from tests.pair_files import RED, colour


def made(*texts):
    rows = [{"caption_0": text, "caption_1": "ü", "reason": "", "detail": ""} for text in texts]
    return pa.RecordBatch.from_pylist(rows, schema=MADE)


def test_progress_that_is_cut_anywhere_keeps_its_whole_batches(tmp_path):
    path = tmp_path / "p.jsonl"
    with Progress(path) as progress:
        progress.add(made("one", "two"))
        first = path.stat().st_size
        progress.add(made("three"))
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = ["one", "two", "three"][: 3 if cut == len(data) else 2 if cut >= first else 0]
        assert [row["caption_0"] for row in read_progress(path)] == whole
        with Progress(path) as progress:
            progress.add(made("new"))
        assert [row["caption_0"] for row in read_progress(path)] == [*whole, "new"]


def test_progress_with_zeros_at_its_end_as_after_a_power_cut(tmp_path):
    path = tmp_path / "p.jsonl"
    with Progress(path) as progress:
        progress.add(made("one"))
    with open(path, "ab") as stream:
        stream.write(bytes(50) + b"\n" + bytes(7))
    assert [row["caption_0"] for row in read_progress(path)] == ["one"]


def read(reader, start, stop):
    return [
        (piece.row + i, piece.where(i), number)
        for piece in reader.read(start, stop)
        for i, number in enumerate(piece.batch.column("number").to_pylist())
    ]


@pytest.mark.parametrize("most", [1, 4, 100])
def test_slices_hold_the_rows_asked_for_with_their_places(tmp_path, most):
    write_pairs(tmp_path / "a.parquet", 10, group=3)
    write_pairs(tmp_path / "b.parquet", 5, group=9)
    reader = SliceReader(open_source(str(tmp_path), PickAPicColumns()), most)
    expected = [(n, f"a.parquet row {n}", n) for n in range(10)]
    expected += [(10 + n, f"b.parquet row {n}", n) for n in range(5)]
    for start, stop in [(0, 4), (4, 5), (8, 13), (14, 15), (2, 12), (0, 15), (7, 7)]:
        assert read(reader, start, stop) == expected[start:stop]


def test_reading_on_opens_a_file_once_and_skips_whole_row_groups(tmp_path, monkeypatch):
    write_pairs(tmp_path / "a.parquet", 60, group=20)
    source = open_source(str(tmp_path), PickAPicColumns())
    opened = []
    real = pq.ParquetFile

    def count(*arguments, **options):
        opened.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(pq, "ParquetFile", count)
    reader = SliceReader(source, 8)
    for start in range(0, 20, 5):
        read(reader, start, start + 5)
    assert len(opened) == 1
    read(reader, 45, 50)  # a whole row group lies between
    assert len(opened) == 2
    read(reader, 51, 60)
    assert len(opened) == 2


def test_row_groups_are_bounded_in_rows_and_bytes_whatever_is_added_at_once():
    schema = pa.schema({"image": pa.binary(), "text": pa.string()})
    big = b"x" * (GROUP_BYTES // 3 + 1)
    rows = [{"image": RED, "text": str(n)} for n in range(600)]
    rows[300:304] = [{"image": big, "text": "big"}] * 4
    table, found = pa.Table.from_pylist(rows, schema), set()
    for step in (1, 97, 600):
        stream = io.BytesIO()
        with CaptionWriter(stream, schema, ["image"]) as writer:
            for start in range(0, 600, step):
                writer.add(table.slice(start, step))
            writer.close(CaptionTally())
        found.add(stream.getvalue())
    assert len(found) == 1
    about = pq.read_metadata(io.BytesIO(found.pop()))
    # 256 rows; then up to the third big one, which fills a group; then 256 rows and what is left
    assert [about.row_group(i).num_rows for i in range(about.num_row_groups)] == [256, 47, 256, 41]


def test_the_oracle_has_words_for_no_thing_and_none_for_a_photograph():
    import numpy as np
    from PIL import Image

    oracle = OracleCaptioner()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    images = [Image.new("RGB", (64, 64), "white"), Image.fromarray(noise).resize((64, 64))]
    assert colour(images[0]) == (255, 255, 255)
    blank, photograph = oracle(images, ["x", "y"], [0, 1])
    assert blank.text == "a picture of nothing"
    assert photograph.text == ""
    assert "coloured regions" in photograph.failure
