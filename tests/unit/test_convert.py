"""`diffpref convert`: the output folder, the report, the command, its memory."""

from __future__ import annotations

import fcntl
import io
import json
import os
import resource
import subprocess
import sys

import pytest

from diffpref.data import convert as stage
from diffpref.data import parts
from diffpref.data.convert import ConvertOptions, convert
from diffpref.data.sources.base import REASONS
from diffpref.errors import UserError
from tests.convert_files import (
    diffpref,
    error,
    files,
    jsonl,
    rows_of,
    run,
    write_images,
)
from tests.pair_files import BLUE, RED, image_bytes, row, write


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


def test_shards_and_workers_and_one_go_give_the_same_bytes(tmp_path):
    rows = [row(float(i % 2), caption=f"p{i % 5}", jpg_0=image_bytes((i, 0, 0))) for i in range(50)]
    rows[7]["jpg_1"] = b"x"
    source = write(tmp_path / "a.parquet", rows, group=9)
    run(source, tmp_path / "one", rows_per_file=7)
    run(source, tmp_path / "workers", rows_per_file=7, workers=2)
    assert files(tmp_path / "workers") == files(tmp_path / "one")
    for index in (2, 0):
        options = ConvertOptions(rows_per_file=7, shard=(index, 3))
        assert convert(str(source), tmp_path / "shards", options, io.StringIO()) is None
    assert sorted(p.name for p in (tmp_path / "shards").glob("part*")) == [
        f"part-0000{n}.parquet" for n in (0, 2, 3, 5, 6)
    ]
    run(source, tmp_path / "shards", rows_per_file=7, shard=(1, 3))
    assert files(tmp_path / "shards") == files(tmp_path / "one")


def test_a_missing_part_alone_is_made_again(tmp_path):
    source = write(tmp_path / "a.parquet", [row(jpg_0=image_bytes((i, 0, 0))) for i in range(20)], group=4)
    out = tmp_path / "out"
    run(source, out, rows_per_file=5)
    before, times = files(out), {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    for name in ("part-00002.parquet", "report.json", "manifest.json"):
        (out / name).unlink()
    (out / ".part-00002.parquet.tmp").write_bytes(b"left by a kill")
    run(source, out, rows_per_file=5)
    assert files(out) == before
    for name in ("part-00000.parquet", "part-00001.parquet", "part-00003.parquet", "settings.json"):
        assert (out / name).stat().st_mtime_ns == times[name]


def test_a_finished_conversion_is_not_made_again(tmp_path, monkeypatch):
    source = write(tmp_path / "a.parquet", [row()])
    first, _ = run(source, tmp_path / "out")
    monkeypatch.setattr(stage, "judge_all", None)
    assert run(source, tmp_path / "out")[0] == first


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rows_per_file": 3}, "another --rows-per-file"),
        ({"keep_ties": True}, "the other --keep-ties"),
        ({"columns": {"caption": "other"}}, "other names or columns in the source"),
        ({"format": "pick-double-caption"}, "another --format"),
    ],
)
def test_a_folder_of_other_settings_is_refused(tmp_path, change, expected):
    source = write(tmp_path / "a.parquet", [row(other="o", caption_0="x", caption_1="y")])
    run(source, tmp_path / "out", format="pick-a-pic")
    before = files(tmp_path / "out")
    assert expected in error(source, tmp_path / "out", **{"format": "pick-a-pic", **change})
    assert files(tmp_path / "out") == before


def test_a_folder_of_other_files_or_of_something_else_is_refused(tmp_path):
    source = write(tmp_path / "a.parquet", [row()])
    run(source, tmp_path / "out")
    write(source, [row(caption="changed")])
    assert "files of other contents" in error(source, tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    assert "chapter.txt" in error(source, tmp_path / "thesis")
    assert files(tmp_path / "thesis") == {"chapter.txt": b"x"}
    assert "is no folder" in error(source, source)


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_report_that_is_gone_or_damaged_is_made_again(tmp_path, content):
    source = write(tmp_path / "a.parquet", [row(), row(0.5)])
    run(source, tmp_path / "out")
    before = files(tmp_path / "out")
    (tmp_path / "out/report.json").unlink()
    if content is not None:
        (tmp_path / "out/report.json").write_text(content)
    run(source, tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_a_part_of_a_finished_folder_is_made_again_when_gone_and_named_when_damaged(tmp_path):
    source = write(tmp_path / "a.parquet", [row(), row(0.0), row()])
    run(source, tmp_path / "out", rows_per_file=1)
    before = files(tmp_path / "out")
    (tmp_path / "out/part-00001.parquet").write_bytes(before["part-00001.parquet"][:-30])
    assert "part-00001.parquet is not a part" in error(source, tmp_path / "out", rows_per_file=1)
    (tmp_path / "out/part-00001.parquet").unlink()
    run(source, tmp_path / "out", rows_per_file=1)
    assert files(tmp_path / "out") == before


def test_a_finished_part_that_was_replaced_by_another_is_named(tmp_path):
    """A part of the same folder, whole and of this command: nothing but its bytes tells."""
    source = write(tmp_path / "a.parquet", [row(jpg_0=image_bytes((i, 0, 0))) for i in range(20)], group=4)
    out = tmp_path / "out"
    run(source, out, rows_per_file=5)
    before = files(out)
    (out / "part-00001.parquet").write_bytes((out / "part-00002.parquet").read_bytes())
    with pytest.raises(UserError, match=r"part-00001\.parquet is not the part that was finished here"):
        run(source, out, rows_per_file=5)
    (out / "part-00001.parquet").unlink()
    run(source, out, rows_per_file=5)
    assert files(out) == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    source = write(tmp_path / "a.parquet", [row()])
    assert f"cannot write {tmp_path / 'link/out'}" in error(source, tmp_path / "link/out")


def test_too_many_bad_rows(tmp_path):
    source = write(tmp_path / "a.parquet", [row(), row(jpg_0=b"x"), row(0.5), row(0.5)])
    text = error(source, tmp_path / "out", max_bad_share=0.24)
    assert "1 of 4 rows" in text
    assert "a.parquet row 1: image 0" in text
    assert not (tmp_path / "out" / "manifest.json").exists()
    report, _ = run(source, tmp_path / "out", max_bad_share=0.25)  # ties are not bad
    assert report["bad"] == 1


def test_nothing_usable(tmp_path):
    assert "all are ties" in error(write(tmp_path / "a.parquet", [row(0.5)]), tmp_path / "out")
    (tmp_path / "b.json").write_text("[]")
    assert "it is empty" in error(tmp_path / "b.json", tmp_path / "out2")


def test_bad_rows_are_named_up_to_a_hundred_and_all_counted(tmp_path):
    rows = [row()] + [row(jpg_0=b"x", caption=str(i)) for i in range(150)]
    source = write(tmp_path / "a.parquet", rows)
    text = io.StringIO()
    report = convert(str(source), tmp_path / "out", ConvertOptions(rows_per_file=40), text)
    assert report is not None
    assert (len(report["bad_rows"]), report["dropped"]["bad_image"]) == (100, 150)
    assert [bad["row"] for bad in report["bad_rows"]] == [f"a.parquet row {n}" for n in range(1, 101)]
    assert "and 50 more" in text.getvalue()
    assert set(report["dropped"]) == set(REASONS)


def test_the_command(tmp_path, images):
    jsonl(images / "a.jsonl", [{"t": "p", "l": "red.png", "r": "blue.png", "label_0": 0}, {"t": "p"}])
    done = diffpref(
        images / "a.jsonl", "--columns", "caption=t", "image_0=l", "image_1=r", "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    assert "kept                      1 (50.0%)" in done.stdout
    assert "a.jsonl row 1 (line 2): there is no label" in done.stdout
    assert rows_of(tmp_path / "out")[0]["label_0"] == 0.0


def test_looking_through_images_needs_no_torch(tmp_path):
    write(tmp_path / "a.parquet", [row()])
    code = (
        "import sys\nfrom diffpref.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "print({'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", tmp_path / "a.parquet", "--out", tmp_path / "out"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.endswith("set()\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.parquet"], "source not found: 'none.parquet'"),
        (["none*.parquet"], "no pairs at"),
        (["a.txt"], "in no known format"),
        (["a.jsonl", "--format", "nope"], "formats: auto, pick-a-pic"),
        (["a.jsonl", "--format", "hpdv2"], "it needs prompt, file_path, human_preference"),
        (["a.jsonl", "--format", "hpdv3"], "not in the format hpdv3"),
        (["a.jsonl", "--format", "pick-a-pic"], "cannot be read as Parquet"),
        (["a.jsonl", "--format", "folders"], "reads a folder"),
        ([".", "--format", "folders"], "w is no folder"),
        ([".", "--format", "jsonl"], "reads one file"),
        (["a.jsonl", "--columns", "caption"], "is not KEY=NAME"),
        (["a.jsonl", "--shard", "2/2"], "--shard 2/2 is none"),
        (["a.jsonl", "--shard", "x"], "not a whole number"),
        (["a.jsonl", "--max-bad-share", "2"], "must lie in 0..1"),
        (["a.jsonl", "--images", "nowhere"], "--images nowhere is no folder"),
        (["a.jsonl", "--split", "train"], "--split has no effect"),
        (["a.jsonl"], "has no column 'caption'"),
        (["nobody/no-such-set"], "neither here nor on the hub"),
    ],
)
def test_a_users_mistake(tmp_path, monkeypatch, capsys, arguments, expected):
    from diffpref.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    assert main(["convert", *arguments, "--out", "out"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert expected in printed.err
    assert not (tmp_path / "out").exists()


def test_a_dataset_of_the_hub_from_its_cache(tmp_path):
    """What an earlier download left, without network."""
    place = tmp_path / "hub" / "datasets--some--pairs"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    data = place / "snapshots" / ("a" * 40) / "data"
    data.mkdir(parents=True)
    write(data / "train-00000-of-00001.parquet", [row()])
    write(data / "test-00000-of-00001.parquet", [row(), row(0.0)])
    environ = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = diffpref("some/pairs", "--out", tmp_path / "out", env=environ)
    assert done.returncode == 0, done.stderr
    assert [r["source_file"] for r in rows_of(tmp_path / "out")] == ["train-00000-of-00001.parquet"]
    done = diffpref("some/pairs", "--split", "test", "--out", tmp_path / "test", env=environ)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "test")) == 2


def test_two_processes_do_not_write_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PATIENCE", 0.2)
    source = write(tmp_path / "a.parquet", [row()])
    (tmp_path / "out").mkdir()
    run(source, tmp_path / "out")
    (tmp_path / "out" / "part-00000.parquet").unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    with open(tmp_path / "out" / ".part-00000.parquet.tmp", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"half a part")
        other.flush()
        assert "another process is writing" in error(source, tmp_path / "out")
        assert (tmp_path / "out" / ".part-00000.parquet.tmp").read_bytes() == b"half a part"
    assert run(source, tmp_path / "out")[0]["kept"] == 1


def test_a_full_disk(tmp_path):
    """The largest file that may be written is one that settings.json fits into and a part does not."""
    source = write(tmp_path / "a.parquet", [row(jpg_0=RED + os.urandom(50_000)) for _ in range(9)])
    done = diffpref(
        source, "--out", tmp_path / "out", "--rows-per-file", 3,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "no room on the disk" in done.stderr
    assert files(tmp_path / "out").keys() == {"settings.json"}


PEAK = (
    "import sys\nfrom diffpref.cli import main\nassert main(sys.argv[1:]) == 0\n"
    "print('peak', next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
)
"""Not getrusage: a new process counts its parent's memory before exec there."""


def _peak(source, out):
    """Peak of the whole process in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "convert", source, "--out", out, "--rows-per-file", "20000"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return int(done.stdout.split("peak ")[1]) / 1024


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_memory_does_not_grow_with_the_rows(tmp_path, kind):
    """Peak of the whole process, in MiB, for 2,000 and for 10,000 rows, of one part and one row group."""
    peaks = []
    for count in (2_000, 10_000):
        place = tmp_path / f"{count}"
        place.mkdir()
        if kind == "parquet":
            blobs = [image_bytes((i % 256, i // 256, 0)) + os.urandom(12_000) for i in range(count)]
            source = write(
                place / "a.parquet",
                [row(jpg_0=blob, caption=f"prompt {i}") for i, blob in enumerate(blobs)],
                group=count,
            )
        else:
            (place / "r.png").write_bytes(RED)
            (place / "b.png").write_bytes(BLUE)
            source = place / "train.json"
            entry = {"file_path": ["r.png", "b.png"], "human_preference": [1, 0], "about": "x" * 6_000}
            source.write_text(json.dumps([entry | {"prompt": f"prompt {i}"} for i in range(count)]))
        # the smaller of two: what the allocator keeps for itself differs by some MiB from run to run
        peaks.append(min(_peak(source, place / out) for out in ("first", "second")))
    # the rows themselves are 92 MiB more, 46 of JSON
    assert peaks[1] < peaks[0] + 20, f"8,000 rows more cost {peaks[1] - peaks[0]:.0f} MiB"
