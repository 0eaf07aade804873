"""Bad input to `diffpref caption`: one clear message, exit code 2, and nothing half-written."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.captions import RulePerturber
from diffpref.captions.build import CaptionOptions, caption
from diffpref.cli import main
from diffpref.config import ColumnsConfig
from diffpref.engine import Engine
from diffpref.errors import UserError
from tests.caption_backends import ColourCaptioner, write_pairs
from tests.pair_files import RED, row, write


def error(pairs, out, method="perturbation", **options) -> str:
    if method != "captioning":
        options.setdefault("perturber", RulePerturber())
    if method != "perturbation":
        options.setdefault("captioner", ColourCaptioner())
    with pytest.raises(UserError) as caught:
        caption(str(pairs), out, CaptionOptions(method=method, **options), io.StringIO())
    return str(caught.value)


def told(capsys, *arguments) -> str:
    assert main(["caption", *map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk(tmp_path, workers):
    """The largest file that may be written is one that settings.json fits into and a part does not."""
    pairs = write(tmp_path / "a.parquet", [row(jpg_0=RED + os.urandom(50_000)) for _ in range(9)])
    options = ("--pairs", pairs, "--method", "perturbation", "--rows-per-file", 3, "--workers", workers)
    done = subprocess.run(
        [sys.executable, "-m", "diffpref", "caption", *map(str, options), "--out", tmp_path / "out"],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "error: no room on the disk while writing the captions" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_the_system_refuses(tmp_path, workers):
    pairs = write_pairs(tmp_path / "a.parquet", 4)
    out, options = tmp_path / "out", {"rows_per_file": 2, "engine": Engine(workers=workers)}
    caption(str(pairs), out, CaptionOptions("perturbation", perturber=RulePerturber(), rows_per_file=2))
    for name in ("part-00001.parquet", "report.json"):
        (out / name).unlink()
    (out / ".part-00001.captions.jsonl").mkdir()
    said = error(pairs, out, **options)
    assert "stopped at an error of the system" in said
    assert ".part-00001.captions.jsonl" in said


BASE = ("--pairs", "tiny:pairs/train.parquet", "--out", "never-made", "--replace")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--method", "hybird", "--captioner", "oracle"], ["did you mean hybrid?"]),
        (["--method", "captioning"], ["needs a --captioner", "oracle"]),
        (["--method", "captioning", "--captioner", "orakle"], ["unknown captioner", "did you mean oracle?"]),
        (["--method", "perturbation", "--captioner", "oracle"],
         ["--captioner has no effect with --method perturbation"]),
        (["--method", "perturbation", "--captioner.level", "x"], ["has no option --captioner.level"]),
        (["--method", "captioning", "--captioner", "oracle", "--perturber.level", "weak"],
         ["--perturber.level has no effect with --method captioning"]),
        (["--method", "perturbation", "--perturber.level", "middle"],
         ["--perturber.level middle is not allowed", '"weak", "medium", "strong"']),
        (["--method", "perturbation", "--perturber.level", "stong"], ["did you mean 'strong'?"]),
        (["--method", "perturbation", "--perturber.seed", "1.5"], ["a whole number"]),
        (["--method", "perturbation", "--perturber.levl", "weak"], ["did you mean --perturber.level?"]),
        (["--method", "perturbation", "--batch", "0"], ["--batch"]),
        (["--method", "perturbation", "--engine", "dask"], ["--engine"]),
        (["--method", "perturbation", "--max-failed-share", "2"], ["must lie in 0..1"]),
        (["--method", "perturbation", "--shard", "3/3"], ["--shard 3/3 is none"]),
        (["--method", "perturbation", "--tokenizer", "no/where/at/all"], ["tokenizer"]),
        (["--method", "perturbation", "--columns.caption", "promt"], ["has no column 'promt'"]),
    ],
)  # fmt: skip
def test_options_that_cannot_be(arguments, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = told(capsys, *BASE, *arguments)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "never-made").exists()


def test_pairs_that_cannot_be_read(tmp_path):
    out = tmp_path / "out"
    assert "no pairs at" in error(tmp_path / "missing.parquet", out)
    (tmp_path / "text.parquet").write_text("no parquet")
    assert "cannot be read as Parquet" in error(tmp_path / "text.parquet", out)
    write(tmp_path / "columns.parquet", [{"caption": "a", "jpg_0": b"", "label_0": 1}])
    assert "has no column 'jpg_1'" in error(tmp_path / "columns.parquet", out)
    write(tmp_path / "empty.parquet", [row()], group=1)
    empty = write(tmp_path / "empty.parquet", [], schema=pq.read_schema(tmp_path / "empty.parquet"))
    assert "no rows in" in error(empty, out)
    assert not out.exists()


def test_files_with_different_columns_are_refused(tmp_path):
    write(tmp_path / "a.parquet", [row(1.0, extra=1)])
    write(tmp_path / "b.parquet", [row(1.0, extra="x")])
    message = error(tmp_path, tmp_path / "out")
    assert "b.parquet has other columns than" in message
    assert "'extra': int64 there, string here" in message


def test_files_that_differ_in_nulls_alone_or_hold_a_column_twice(tmp_path):
    first = pq.read_table(write(tmp_path / "a.parquet", [row(1.0, extra=1)]))
    strict = pa.schema([field.with_nullable(field.name != "extra") for field in first.schema])
    pq.write_table(first.cast(strict), tmp_path / "b.parquet")
    message = error(tmp_path, tmp_path / "out")
    assert "'extra': int64 there, int64 without nulls here" in message
    pq.write_table(first.append_column("extra", pa.array(["x"])), tmp_path / "b.parquet")
    assert "'extra': int64 there, int64 and string here" in error(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("label", [0.7, None, 2.0])
def test_a_bad_label_is_named_before_anything_is_captioned(tmp_path, label):
    pairs = write(tmp_path / "p.parquet", [row(1.0)] * 20 + [row(label)])
    calls = tmp_path / "calls"
    message = error(pairs, tmp_path / "out", "captioning", captioner=ColourCaptioner(str(calls)))
    assert "row 20 is not 0, 0.5 or 1" in message
    assert not calls.exists()


def test_a_damaged_part_of_the_source_is_named(tmp_path):
    pairs = write_pairs(tmp_path / "p.parquet", 40, group=20)
    about = pq.read_metadata(pairs).row_group(1)
    column = next(
        about.column(i) for i in range(about.num_columns) if about.column(i).path_in_schema == "number"
    )
    data = bytearray(pairs.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    pairs.write_bytes(data)
    message = error(pairs, tmp_path / "out", rows_per_file=16)
    assert "p.parquet" in message
    assert "damaged" in message
    assert [path.name for path in (tmp_path / "out").glob("part*")] == ["part-00000.parquet"]


def test_captions_that_are_there_are_not_written_over_unasked(tmp_path, caplog):
    pairs = write(tmp_path / "p.parquet", [row(1.0, caption_0="mine", caption_1="mine")])
    message = error(pairs, tmp_path / "out")
    assert "has caption_0, caption_1 already" in message
    assert "--replace" in message
    caption(
        str(write(tmp_path / "q.parquet", [row(1.0)])), tmp_path / "out",
        CaptionOptions("perturbation", perturber=RulePerturber(), replace=True), io.StringIO(),
    )  # fmt: skip
    assert "--replace has no effect" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        {"caption_0": "caption"},
        {"caption_0": "c", "caption_1": "c"},
        {"caption_1": "tokens_0"},
        {"caption_0": ""},
    ],
)
def test_new_columns_have_names_of_their_own(tmp_path, names):
    pairs = write(tmp_path / "p.parquet", [row(1.0)])
    columns = ColumnsConfig(**names)
    assert "two columns have the same name" in error(pairs, tmp_path / "out", columns=columns)
    assert not (tmp_path / "out").exists()


def test_a_damaged_report_is_made_again(tmp_path):
    pairs = write(tmp_path / "p.parquet", [row(1.0, caption="two red dogs")])
    options = CaptionOptions("perturbation", perturber=RulePerturber())
    before = caption(str(pairs), tmp_path / "out", options, io.StringIO())
    (tmp_path / "out/report.json").write_text("{")
    after = caption(str(pairs), tmp_path / "out", options, io.StringIO())
    assert before is not None
    assert after is not None
    assert {**after, "run": None} == {**before, "run": None}


def test_a_part_of_a_finished_folder_is_made_again_when_gone_and_named_when_damaged(tmp_path):
    pairs = write(tmp_path / "p.parquet", [row(1.0, caption="two red dogs")])
    options = CaptionOptions("perturbation", perturber=RulePerturber())
    caption(str(pairs), tmp_path / "out", options, io.StringIO())
    part = tmp_path / "out/part-00000.parquet"
    before = part.read_bytes()
    part.write_bytes(before[:-30])
    with pytest.raises(UserError, match="is not a part that diffpref caption finished"):
        caption(str(pairs), tmp_path / "out", options, io.StringIO())
    part.unlink()
    caption(str(pairs), tmp_path / "out", options, io.StringIO())
    assert part.read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    pairs = write_pairs(tmp_path / "p.parquet", 10)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "is not empty and no caption run" in error(pairs, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    assert "is no folder" in error(pairs, tmp_path / "file")


def test_other_settings_are_named(tmp_path):
    pairs = write_pairs(tmp_path / "p.parquet", 10)
    out = tmp_path / "out"
    options = {"captioner": ColourCaptioner(), "perturber": RulePerturber("weak"), "limit": 8}
    caption(str(pairs), out, CaptionOptions("hybrid", **options), io.StringIO())
    for changed, name in [
        ({"perturber": RulePerturber("strong")}, "another --perturber.level"),
        ({"perturber": RulePerturber("weak", 3)}, "another --perturber.seed"),
        ({"captioner": ColourCaptioner(seed=1)}, "another --captioner.seed"),
        ({"tokenizer": "tiny:model"}, "another --tokenizer"),
        ({"rows_per_file": 4}, "another --rows-per-file"),
        ({"limit": 9}, "another --limit"),
        ({"replace": True}, "the other --replace"),
    ]:
        assert f"made with {name}" in error(pairs, out, "hybrid", **{**options, **changed})
    message = error(pairs, out, "captioning", captioner=ColourCaptioner(), limit=8)
    assert "another --method and another --perturber" in message
    other = write_pairs(tmp_path / "q.parquet", 10)
    assert "made with files of other contents" in error(other, out, "hybrid", **options)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    report = caption(
        str(pairs.rename(moved / "p.parquet")), out, CaptionOptions("hybrid", **options), io.StringIO()
    )
    assert report is not None  # the same file in another place, and a device, are no other settings
    options["captioner"] = ColourCaptioner(device="cuda:7")
    assert caption(str(moved / "p.parquet"), out, CaptionOptions("hybrid", **options), io.StringIO())


def test_a_damaged_part_of_ours_is_named(tmp_path):
    pairs = write_pairs(tmp_path / "p.parquet", 20)
    out = tmp_path / "out"
    options = CaptionOptions("perturbation", perturber=RulePerturber(), rows_per_file=10)
    caption(str(pairs), out, options, io.StringIO())
    (out / "manifest.json").unlink()
    (out / "part-00001.parquet").write_bytes(b"PAR1 and not much more PAR1")
    message = error(pairs, out, rows_per_file=10)
    assert "part-00001.parquet is not a part that diffpref caption finished" in message


def test_too_many_failures_stop_the_run_and_a_larger_share_goes_on(tmp_path):
    rows = [row(n % 2, caption=None if n in (2, 25) else "a red dog") for n in range(30)]
    pairs = write(tmp_path / "p.parquet", rows)
    out = tmp_path / "out"
    message = error(pairs, out, rows_per_file=10)
    assert "1 rows got no captions, more than allowed of 30" in message
    assert "p.parquet row 2: caption is null or empty" in message
    assert [path.name for path in sorted(out.glob("part*"))] == ["part-00000.parquet"]
    message = error(pairs, out, rows_per_file=10, max_failed_share=0.05)
    assert "2 of 30 rows" in message
    assert not (out / "manifest.json").exists()
    options = CaptionOptions(
        "perturbation", perturber=RulePerturber(), rows_per_file=10, max_failed_share=0.1
    )
    report = caption(str(pairs), out, options, io.StringIO())
    assert report is not None
    assert (report["rows"], report["kept"], report["failed"]) == (30, 28, 2)
    assert json.loads((out / "manifest.json").read_text())["key"]["method"] == "perturbation"


def test_no_captions_at_all_is_an_error_whatever_is_allowed(tmp_path):
    pairs = write(tmp_path / "p.parquet", [row(1.0, caption="")])
    message = error(pairs, tmp_path / "out", max_failed_share=1.0)
    assert "got captions" in message
    assert "row 0: caption is null or empty" in message


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "diffpref", "caption", "--pairs", str(tmp_path), "--method",
               "perturbation", "--out", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Parquet file in the folder")
    assert "Traceback" not in done.stderr
