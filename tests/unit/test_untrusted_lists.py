"""Lists, folders and tables whose paths, texts and sizes are hostile: every entry is used or named, and
nothing waits, fills the memory or reads files elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffpref.cli import main
from diffpref.config.loading import read_toml
from diffpref.data.pairs import open_pairs
from diffpref.errors import UserError
from diffpref.image_tables import open_images
from diffpref.prompt_lists import read_prompts
from diffpref.scoring import score
from diffpref.suites import load_suite
from tests.convert_files import dropped, error, jsonl, pair, run, write_images
from tests.pair_files import BLUE, RED

CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def diffpref(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffpref", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=CPU)


def picture(kind: str) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, kind)
    return buffer.getvalue()


def scored(place: Path, **options) -> dict[str, str | None]:
    """Errors by file of a table of scores."""
    table = pq.read_table(score(place, ["oracle"], **options))
    errors = table["error"].to_pylist() if "error" in table.column_names else [None] * len(table)
    return dict(zip(table["file"].to_pylist(), errors, strict=True))


# Folders to score


def test_every_image_of_a_folder_is_scored_or_named_whatever_its_ending(tmp_path, caplog):
    images = {
        "A.JPG": "JPEG", "e.PNG": "PNG", "w.webp": "WEBP", "b.jfif": "JPEG", "deep/t.TIF": "TIFF",
        "bare": "PNG", "odd.bin": "GIF", "c.avif": "AVIF",
    }  # fmt: skip
    (tmp_path / "deep").mkdir()
    for name, kind in images.items():
        (tmp_path / name).write_bytes(picture(kind))
        (tmp_path / name).with_suffix(".TXT" if name == "A.JPG" else ".txt").write_text("a red circle")
    for name in ("h.heic", "p.png"):
        (tmp_path / name).with_suffix(".caption").write_text("a red circle")
    (tmp_path / "h.heic").write_bytes(b"no image at all")
    (tmp_path / "p.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "linked").symlink_to(tmp_path / "deep")
    (tmp_path / ".hidden.png").write_bytes(picture("PNG"))
    for name in ("notes.pdf", "orphan.txt", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        score(tmp_path, ["oracle"])
    assert "3 of 10 images cannot be scored" in str(caught.value)
    found = scored(tmp_path, allow_missing=True)
    assert sorted(found) == sorted([*images, "h.heic", "p.png"])
    assert {name for name, error in found.items() if error} == {"c.avif", "h.heic", "p.png"}
    assert found["p.png"] == "the file is missing"
    warned = caplog.messages[-1]
    assert all(name in warned for name in ("linked", ".hidden.png", "notes.pdf", "orphan.txt"))
    assert not any(name in warned for name in ("DS_Store", "scores.parquet"))


def test_images_that_the_list_of_a_folder_leaves_out_are_named(tmp_path, caplog):
    for name in ("a.png", "b.png", "c.avif"):
        (tmp_path / name).write_bytes(picture("PNG"))
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": "./a.png", "prompt": "p"}])
    assert len(open_images(tmp_path)) == 1
    assert "2 files not in metadata.jsonl and not scored: b.png, c.avif" in caplog.messages[-1]


def test_prompts_of_a_folder_come_from_that_folder_and_are_one_for_an_image(tmp_path):
    (tmp_path / "secret.txt").write_text("the key is 123")
    place = tmp_path / "images"
    place.mkdir()
    (place / "a.png").write_bytes(picture("PNG"))
    (place / "a.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match="leads out of its folder"):
        open_images(place)
    (place / "a.txt").unlink()
    (place / "a.txt").write_text("one")
    (place / "a.caption").write_text("two")
    with pytest.raises(UserError, match="has two prompts"):
        open_images(place)
    jsonl(tmp_path / "list.jsonl", [{"file_name": "a.png", "prompt": "p"}])
    (place / "metadata.jsonl").symlink_to(tmp_path / "list.jsonl")
    with pytest.raises(UserError, match="leads out of its folder"):
        open_images(place)


def test_a_hub_snapshot_of_links_to_its_blobs_is_a_folder_like_any_other(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name, data in {"a.png": picture("PNG"), "a.txt": b"a cat"}.items():
        (blobs / name.replace(".", "")).write_bytes(data)
        (snapshot / name).symlink_to(Path("../../blobs") / name.replace(".", ""))
    assert [row.prompt for row in open_images(snapshot)] == ["a cat"]


# Lists to score


def test_paths_of_a_list_that_cannot_be_read_are_named_at_once(tmp_path):
    (tmp_path / "a.png").write_bytes(picture("PNG"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with open(tmp_path / "huge.png", "wb") as stream:
        stream.truncate(6 * 2**30)  # of nothing on the disk
    names = ["a.png", "pipe.png", "zero.png", "huge.png", "nul\0.png", "x" * 5000, ".", "gone.png"]
    place = jsonl(tmp_path / "list.jsonl", [{"file": name, "prompt": "a red circle"} for name in names])
    found = scored(place, allow_missing=True)
    assert list(found) == names
    reasons = {name: reason for name, reason in found.items() if reason}
    assert len(reasons) == 7
    assert reasons["pipe.png"] == reasons["zero.png"] == reasons["."] == "it is no file"
    assert "6,442,450,944 bytes" in reasons["huge.png"]
    assert reasons["nul\0.png"] == "the path is not valid"
    assert "too long" in reasons["x" * 5000]


def test_a_name_that_is_no_utf8_is_named_and_not_lost(tmp_path):
    (tmp_path / "a.png").write_bytes(picture("PNG"))
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as stream:
        stream.write(picture("PNG"))
    for name in (b"a.txt", b"\xff.txt"):
        with open(os.fsencode(tmp_path) + b"/" + name, "w") as text:
            text.write("a red circle")
    assert scored(tmp_path, allow_missing=True) == {"a.png": None, "\\udcff.png": "its name is not UTF-8"}


# Folders of pairs


def sides(place: Path, files: dict[str, str | bytes]) -> Path:
    for side, data in {"w": RED, "l": BLUE}.items():
        for name in "ab":
            (place / side).mkdir(parents=True, exist_ok=True)
            (place / side / f"{name}.png").write_bytes(data)
    for name, text in files.items():
        (place / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return place


CAPTIONS = ("caption", "caption_0", "caption_1")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"w/a.txt": "A", "l/a.txt": "A, blurred", "w/b.caption": "B", "l/b.caption": "B"},
            [("A", "A", "A, blurred"), ("B", "B", "B")],
        ),
        ({"a.txt": "A", "b.txt": "B", "l/a.TXT": "flaws"}, [("A", "A", "flaws"), ("B", "B", "B")]),
        (
            {"captions.txt": "a\tA\nb\tB\n", "w/a.txt": "A, sharp", "l/a.txt": "A, dull"},
            [("A", "A, sharp", "A, dull"), ("B", "B", "B")],
        ),
        ({"w/a.caption": "A", "l/a.txt": "A", "l/b.caption": "B"}, [("A",), ("B",)]),
    ],
)
def test_each_side_of_a_folder_keeps_its_own_caption(tmp_path, files, expected):
    place = sides(tmp_path / "pairs", files)
    _, kept = run(place, tmp_path / "out")
    assert [tuple(row[name] for name in CAPTIONS if name in row) for row in kept] == expected


def test_companions_of_images_are_no_images_and_are_named(tmp_path, caplog):
    more = {"w/a.npz": b"PK", "w/.b.png": RED, "l/a.json": "{}", "w/a.txt": "A", "w/b.txt": "B"}
    report, kept = run(sides(tmp_path / "pairs", more), tmp_path / "out")
    assert len(kept) == report["rows"] == 2
    assert "3 files neither an image nor a caption" in caplog.text
    assert all(name in caplog.text for name in ("w/a.npz", "w/.b.png", "l/a.json"))


def test_folders_one_level_deeper_are_all_converted(tmp_path):
    for name in ("1_cats", "2_dogs"):
        sides(tmp_path / "pairs" / name, {"w/a.txt": name, "w/b.txt": name})
    _, kept = run(tmp_path / "pairs", tmp_path / "out")
    assert [(row["source_file"], row["caption"]) for row in kept] == [
        ("1_cats/w/a.png", "1_cats"), ("1_cats/w/b.png", "1_cats"),
        ("2_dogs/w/a.png", "2_dogs"), ("2_dogs/w/b.png", "2_dogs"),
    ]  # fmt: skip
    (tmp_path / "pairs" / "3_birds" / "w").mkdir(parents=True)
    assert "3_birds/l is no folder" in error(tmp_path / "pairs", tmp_path / "out2")


def test_captions_and_folders_of_pairs_never_lead_out(tmp_path):
    (tmp_path / "secret.txt").write_text("the key is 123")
    place = sides(tmp_path / "pairs", {"b.txt": "B"})
    (place / "w" / "a.txt").symlink_to(tmp_path / "secret.txt")
    (place / "l" / "more").symlink_to(place / "w")
    os.mkfifo(place / "l" / "b.txt")
    report, kept = run(sides(place / "again", {"w/a.txt": "A", "w/b.txt": "B"}).parent, tmp_path / "out")
    assert [row["caption"] for row in kept] == ["A", "B"]
    assert dropped(report) == {"outside_images": 2, "missing_file": 1}
    listed = sides(tmp_path / "listed", {})
    (listed / "captions.txt").symlink_to(tmp_path / "secret.txt")
    assert "leads out of its folder" in error(listed, tmp_path / "out2")


def test_prompts_of_a_folder_never_lead_out_and_none_is_overlooked(tmp_path):
    place = tmp_path / "prompts"
    place.mkdir()
    (place / "A.TXT").write_text("one")
    (place / "b.txt").write_text("two")
    assert [text for text, _ in read_prompts(str(place), "prompts")] == ["one", "two"]
    (place / "c.txt").symlink_to(place / "gone.txt")
    with pytest.raises(UserError, match=r"c\.txt cannot be read"):
        read_prompts(str(place), "prompts")
    (place / "c.txt").unlink()
    (tmp_path / "secret.txt").write_text("the key is 123")
    (place / "c.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match="leads out of its folder"):
        read_prompts(str(place), "prompts")


# Texts

BLANK = [
    "\u200b\u200d\ufeff",
    "\u2060\u00a0 \t",
    "\x00\x1f",
    "\u202e\u2066",
    "\u3164\u115f",
    "\u2800",
    "\U000e0041",
]


def test_captions_that_show_nothing_are_blank(tmp_path):
    images = write_images(tmp_path / "images")
    seen = ["é", "👩\u200d🚀", "。", "\u0301x"]
    source = jsonl(images / "a.jsonl", [pair(caption=text) for text in [*BLANK, *seen]])
    report, kept = run(source, tmp_path / "out")
    assert [row["caption"] for row in kept] == seen
    assert dropped(report) == {"no_caption": len(BLANK)}
    texts = {"caption": [*BLANK, *seen], "label_0": [1.0] * 11, "jpg_0": [RED] * 11, "jpg_1": [BLUE] * 11}
    pq.write_table(pa.table(texts), tmp_path / "pairs.parquet")
    stats = open_pairs(tmp_path / "pairs.parquet", max_bad_share=1.0).stats
    assert (stats.bad, stats.kept) == (len(BLANK), len(seen))
    (tmp_path / "p.json").write_text(json.dumps(["a", "\u200b"]))
    with pytest.raises(UserError, match="entry 1 is not a text"):
        read_prompts(str(tmp_path / "p.json"))


def test_a_caption_of_megabytes_is_no_caption(tmp_path):
    images = write_images(tmp_path / "images")
    long = "a" * (2**20 + 1)
    report, kept = run(jsonl(images / "a.jsonl", [pair(caption=long), pair()]), tmp_path / "out")
    assert (len(kept), dropped(report)) == (1, {"malformed_row": 1})
    table = {"caption": [long, long * 4, "p"], "label_0": [1.0] * 3, "jpg_0": [RED] * 3, "jpg_1": [BLUE] * 3}
    pq.write_table(pa.table(table), tmp_path / "pairs.parquet")
    report, kept = run(tmp_path / "pairs.parquet", tmp_path / "out2")
    assert (len(kept), dropped(report)) == (1, {"malformed_row": 2})
    assert open_pairs(tmp_path / "pairs.parquet", max_bad_share=1.0).stats.bad == 2


def test_a_csv_line_without_end_is_one_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr("diffpref.data.sources.lists.LARGEST_TEXT", 100)
    images = write_images(tmp_path / "images")
    row = "p,red.png,blue.png,1\n"
    (images / "a.csv").write_text("caption,image_0,image_1,label_0\n" + row + "x" * 1000 + "\n" + row)
    report, kept = run(images / "a.csv", tmp_path / "out")
    assert (len(kept), dropped(report)) == (2, {"malformed_row": 1})


@pytest.mark.parametrize("first", ["[broken", '[{"caption": 1}', "[]", "[1, 2]", '[{"a": "b"},', "["])
def test_a_damaged_first_line_is_one_bad_row(tmp_path, first):
    images = write_images(tmp_path / "images")
    good = json.dumps(pair())
    (images / "a.jsonl").write_text(f"{first}\n{{broken too\n\n{good}\n{good}\n")
    report, kept = run(images / "a.jsonl", tmp_path / "out")
    assert (report["rows"], len(kept), dropped(report)) == (4, 2, {"malformed_row": 2})


@pytest.mark.parametrize("form", ["[{0},\n{0}]", "[\n{0}\n,{0}\n]", "[{0},{0}]", "[\n  {0},\n  {0}\n]\n"])
def test_an_array_may_stand_in_a_jsonl_file(tmp_path, form):
    images = write_images(tmp_path / "images")
    (images / "a.jsonl").write_text(form.replace("{0}", json.dumps(pair())))
    report, kept = run(images / "a.jsonl", tmp_path / "out")
    assert report["rows"] == len(kept) == 2
    (images / "cut.jsonl").write_text("[\n" + json.dumps(pair()) + ",\n" + json.dumps(pair()) + "\n")
    assert "is damaged" in error(images / "cut.jsonl", tmp_path / "out2")


# Sizes


def bomb(path: Path, size: int) -> None:
    images = [RED, bytes(size), RED]
    table = pa.table({"caption": ["a", "b", "c"], "jpg_0": images, "jpg_1": [BLUE] * 3, "label_0": [1.0] * 3})
    pq.write_table(table, path, compression="zstd", row_group_size=1, use_dictionary=False)
    assert path.stat().st_size < size / 1000


def test_a_cell_that_expands_beyond_any_image_is_never_unpacked(tmp_path, monkeypatch):
    """Row groups apart, so that only that one is left out."""
    monkeypatch.setattr("diffpref.data.schema.LARGEST_IMAGE", 10**7)
    bomb(path := tmp_path / "pairs.parquet", 2 * 10**7)
    before = pa.default_memory_pool().max_memory()
    report, kept = run(path, tmp_path / "out")
    assert pa.default_memory_pool().max_memory() - before < 10**7
    assert [row["caption"] for row in kept] == ["a", "c"]
    assert "'jpg_0' expands from" in report["bad_rows"][0]["detail"]
    for read in (open_pairs, lambda path: open_images(path, {"image": "jpg_0"})):
        with pytest.raises(UserError, match="too large to read"):
            read(path)


@pytest.mark.slow
def test_half_a_gigabyte_in_a_cell_costs_no_memory(tmp_path):
    bomb(path := tmp_path / "pairs.parquet", 500 * 10**6)
    measure = (
        "import sys; from diffpref.cli import main; code = main(sys.argv[1:]);"
        "print(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line]); sys.exit(code)"
    )
    command = [sys.executable, "-c", measure, "convert", str(path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 400_000  # KiB; the cell alone is 488,281


DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [DEEP, "[" * 300 + "]" * 300, '{"a":' * 5000 + "1" + "}" * 5000])
def test_brackets_without_end_are_one_error(tmp_path, text):
    for name, read in {
        "p.json": lambda p: read_prompts(str(p)), "p.jsonl": lambda p: read_prompts(str(p)),
        "i.jsonl": open_images,
    }.items():  # fmt: skip
        (tmp_path / name).write_text(
            f'{{"file": "a.png", "prompt": "p", "x": {text}}}' if "l" in name else text
        )
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        assert len(str(caught.value)) < 1000
    images = write_images(tmp_path / "images")
    (images / "a.json").write_text(f"[{json.dumps(pair())}, {text}, {json.dumps(pair())}]")
    if len(text) > 10_000:  # too deep for the decoder to find its end
        assert "damaged behind its first 1 rows" in error(images / "a.json", tmp_path / "out")
    else:
        report, _ = run(images / "a.json", tmp_path / "out")
        assert dropped(report) == {"malformed_row": 1}


@pytest.mark.parametrize("text", [f"a = {DEEP}", ".".join("a" * 3000) + " = 1", "a = " + "{a = " * 1000])
def test_nested_toml_is_one_error(tmp_path, text):
    path = tmp_path / "a.toml"
    path.write_text(text)
    for read in (read_toml, load_suite):
        with pytest.raises(UserError, match="TOML"):
            read(path)


def test_a_config_or_suite_without_end_is_one_error(tmp_path):
    (tmp_path / "a.toml").symlink_to("/dev/zero")
    for read in (read_toml, load_suite):
        with pytest.raises(UserError):
            read(tmp_path / "a.toml")


@pytest.mark.parametrize(
    "arguments",
    [
        ("score", "{}", "--evaluators", "oracle"), ("convert", "{}", "--out", "o"), ("train", "{}"),
        ("generate", "--model", "tiny:model", "--suite", "{}", "--out", "o"), ("check", "{}"),
        ("caption", "--pairs", "{}", "--method", "hybrid", "--out", "o"),
        ("convert", "tiny:pairs/train.parquet", "--out", "{}"),
    ],
)  # fmt: skip
def test_a_name_of_five_thousand_characters_is_one_error(arguments, capsys):
    assert main([argument.format("n" * 5000) for argument in arguments]) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_a_null_character_in_a_config_is_one_error(tmp_path, capsys):
    (tmp_path / "a.toml").write_text('output = "runs/a\\u0000b"\n[model]\nbase = "tiny:model"\n')
    assert main(["train", str(tmp_path / "a.toml")]) == 2
    assert "output" in (said := capsys.readouterr().err)
    assert "null character" in said


# Parquet in folders


def test_no_parquet_file_of_a_folder_is_overlooked(tmp_path, caplog):
    table = pa.table({"caption": ["p"], "label_0": [1.0], "jpg_0": [RED], "jpg_1": [BLUE]})
    for name in ("a.parquet", "B.PARQUET", "deep/c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / name)
    assert len(open_pairs(tmp_path)) == 2
    assert "deep/c.parquet" in caplog.messages[-1]
    (tmp_path / "d.parquet").symlink_to(tmp_path / "gone")
    for spec in (tmp_path, f"{tmp_path}/*.parquet"):
        with pytest.raises(UserError, match="broken link"):
            open_pairs(spec)


# The terminal


def test_an_argument_that_is_no_utf8_is_one_error(tmp_path):
    place = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(place)
    for arguments in (["score", place, "--evaluators", "oracle"], ["convert", place, "--out", place + b"/o"]):
        done = subprocess.run(
            [sys.executable, "-m", "diffpref", *arguments], capture_output=True, timeout=100
        )
        assert (done.returncode, done.stdout) == (2, b"")
        assert b"is not UTF-8" in done.stderr
        assert b"Traceback" not in done.stderr


EVIL = "\x1b]0;owned\x07\x1b[31m\u202e\u200b\nerror: gone\r"


def tame(shown: str) -> None:
    assert "owned" in shown
    assert "Traceback" not in shown
    assert not set("\x1b\x07\u202e\u200b") & set(shown), shown
    assert "error: gone" not in shown.splitlines()


def test_names_never_steer_the_terminal(tmp_path, capsys):
    place = tmp_path / f"images{EVIL}"
    images = write_images(place)
    (images / f"{EVIL}.bin").write_bytes(b"x")
    jsonl(
        images / "a.jsonl",
        [{**pair(caption=1, image_1="x"), f"{EVIL}col": 1}, pair(image_1=f"{EVIL}.png"), pair()],
    )
    table = pa.table({f"col{EVIL}": [1]})
    pq.write_table(table, images / "a.parquet")
    for arguments in (
        ("convert", images / "a.jsonl", "--out", place / "out"),
        ("score", images, "--evaluators", "oracle"),
    ):
        done = diffpref(*arguments)
        assert done.returncode == (2 if "score" in arguments else 0), done.stderr
        tame(done.stdout + done.stderr)
    for arguments in (
        ("convert", images / "a.jsonl", "--out", place / "o", "--columns", f"caption={EVIL}"),
        ("convert", images / "a.parquet", "--out", place / "o"),
        ("score", images / "gone", "--evaluators", EVIL),
        (f"train{EVIL}",),
        ("train", f"--{EVIL}"),
        ("check", EVIL),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        tame("".join(capsys.readouterr()))


def test_a_lone_surrogate_is_printed_and_progress_bars_still_move(capsys):
    from tqdm import tqdm

    from diffpref.texts import printable_stream

    stream = printable_stream(sys.stdout)
    print("a\udcff\x1b[2J", file=stream)
    for _ in tqdm(range(2), desc="x\x1b[31m", file=stream, mininterval=0):
        pass
    out = capsys.readouterr().out
    assert out.startswith("a\\udcff\\x1b[2J\n\rx\\x1b[31m:   0%")
    assert "\x1b" not in out
    assert "\r" in out.strip()
