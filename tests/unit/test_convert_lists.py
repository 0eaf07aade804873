"""HPDv2, HPDv3, JSON lines, CSV and folders, with real small images; counts made by hand."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from tests.convert_files import (
    GREEN,
    dropped,
    error,
    jsonl,
    pair,
    run,
    write_images,
)
from tests.pair_files import BLUE, RED


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


def test_hpdv2_train(tmp_path, images):
    entries = [
        {"prompt": "p", "file_path": ["red.png", "blue.png"], "human_preference": [1, 0]},
        {"prompt": "q", "file_path": ["red.png", "green.png"], "human_preference": [0, 1]},
        {"prompt": "q", "file_path": ["red.png", "gone.png"], "human_preference": [0, 1]},
        {"prompt": "q", "file_path": ["red.png"], "human_preference": [1]},
        {"prompt": "q", "file_path": ["red.png", "blue.png", "green.png"], "human_preference": [1, 0, 0]},
        {"prompt": "q", "file_path": ["red.png", "blue.png"], "human_preference": [1, 1]},
        {"prompt": "q", "file_path": ["red.png", "blue.png"], "human_preference": [0.5, 0.5]},
        {"prompt": "q", "file_path": ["red.png", "blue.png"]},
        {"prompt": 3, "file_path": ["red.png", "blue.png"], "human_preference": [1, 0]},
        {"prompt": "q", "file_path": ["red.png", 3], "human_preference": [1, 0]},
        {"prompt": "q", "file_path": ["red.png", "rot ü.png"], "human_preference": [1, 0]},
        "nonsense",
    ]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    report, kept = run(tmp_path / "train.json", tmp_path / "out", images=images)
    assert [(r["caption"], r["label_0"], r["jpg_1"]) for r in kept] == [("p", 1.0, BLUE), ("q", 0.0, GREEN)]
    assert report["rows"] == 12
    assert dropped(report) == {
        "tie": 1, "bad_label": 1, "missing_file": 1, "identical_images": 1, "malformed_row": 6,
    }  # fmt: skip
    assert report["bad_rows"][0] == {
        "row": "train.json row 2", "reason": "missing_file",
        "detail": "'gone.png': No such file or directory",
    }  # fmt: skip


def test_hpdv2_ranks_become_pairs(tmp_path, images):
    """Three images of ranks 1, 0, 1: the second beats both others, which tie. The path of one is empty."""
    entries = [
        {"prompt": "p", "image_path": ["red.png", "blue.png", "green.png"], "rank": [1, 0, 1]},
        {"prompt": "q", "image_path": ["red.png", "blue.png", ""], "rank": [2, 5, None]},
        {"prompt": "q", "image_path": ["red.png"], "rank": [0]},
        {"prompt": "q", "image_path": ["red.png", "blue.png"], "rank": [0]},
    ]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    report, kept = run(tmp_path / "test.json", tmp_path / "out", images=images)
    assert [(r["jpg_0"], r["jpg_1"], r["label_0"], r["source_row"]) for r in kept] == [
        (RED, BLUE, 0.0, 0), (BLUE, GREEN, 1.0, 0), (RED, BLUE, 1.0, 1),
    ]  # fmt: skip
    assert report["rows"] == 3 + 3 + 1 + 1
    assert dropped(report) == {"tie": 1, "no_label": 2, "malformed_row": 2}
    assert report["bad_rows"][0]["row"] == "test.json row 1, images 0 and 2"


@pytest.mark.parametrize("lines", [True, False])
def test_hpdv3(tmp_path, images, lines):
    entries = [
        {"prompt": "p", "path1": "red.png", "path2": "blue.png", "confidence": 0.75},
        {"prompt": "p", "path1": "blue.png", "path2": "red.png", "confidence": None, "choice_dist": [9, 1]},
        {"prompt": "p", "path1": "blue.png"},
        {"prompt": "p", "path1": "blue.png", "path2": "cut.jpg"},
    ]
    text = "\n".join(map(json.dumps, entries)) if lines else json.dumps(entries, indent=1)
    (tmp_path / "train.json").write_text("\ufeff" + text, encoding="utf-8")
    report, kept = run(tmp_path / "train.json", tmp_path / "out", images=images)
    assert [(r["jpg_0"], r["label_0"], r["confidence"]) for r in kept] == [
        (RED, 1.0, 0.75), (BLUE, 1.0, None),
    ]  # fmt: skip
    assert dropped(report) == {"malformed_row": 1, "bad_image": 1}


def test_jsonl_with_every_kind_of_bad_line(tmp_path, images):
    source = images / "pairs.jsonl"
    good = [json.dumps(pair(caption="日本 ü 🙂")), json.dumps(pair(image_1="rot ü.png", image_0="blue.png"))]
    lines = [
        good[0].encode(), b"", b"{broken", b'{"caption": "\xff"}', b"[1, 2]", good[1].encode(),
        json.dumps(pair(caption="\ud800")).encode(), json.dumps(pair(label_0="maybe")).encode(),
        json.dumps(pair(image_0=["red.png"])).encode(), b"[" * 100_000,
    ]  # fmt: skip
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    report, kept = run(source, tmp_path / "out")
    assert [r["caption"] for r in kept] == ["日本 ü 🙂", "p"]
    assert report["rows"] == 9  # the empty line is no row
    assert dropped(report) == {"malformed_row": 6, "bad_label": 1}
    assert [bad["row"] for bad in report["bad_rows"]][:2] == [
        "pairs.jsonl row 1 (line 3)", "pairs.jsonl row 2 (line 4)",
    ]  # fmt: skip


def test_a_line_without_end_is_one_bad_row(tmp_path, images, monkeypatch):
    monkeypatch.setattr("diffpref.data.sources.entries.LONGEST", 200)
    source = images / "pairs.jsonl"
    source.write_text(f"{json.dumps(pair())}\n{'x' * 1000}\n{json.dumps(pair())}\n{'y' * 1000}")
    report, kept = run(source, tmp_path / "out")
    assert (len(kept), dropped(report)) == (2, {"malformed_row": 2})


def test_csv_quoting_and_bad_rows(tmp_path, images):
    source = images / "pairs.csv"
    with open(source, "w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["caption", "image_0", "image_1", "label_0"])
        writer.writerow(['say "hi", twice\nand again', "red.png", "blue.png", "1"])
        writer.writerow(["kölsch", "red.png", "rot ü.png", "0.0"])
        writer.writerow(["p", "red.png", "blue.png", ""])
        writer.writerow(["p", "red.png", "blue.png"])
        writer.writerow(["p", "red.png", "blue.png", "1", "more"])
        stream.write('"p"x,red.png,blue.png,1\r\n')
        writer.writerow(["p", "", "blue.png", "0.5"])
        writer.writerow(["p", "", "blue.png", "1"])
        writer.writerow(["last", "green.png", "blue.png", "0"])
    with open(source, "ab") as raw:
        raw.write(b"\xff,red.png,blue.png,1\r\n")
    report, kept = run(source, tmp_path / "out")
    assert [(r["caption"], r["label_0"]) for r in kept] == [
        ('say "hi", twice\nand again', 1.0),
        ("last", 0.0),
    ]
    assert report["rows"] == 10
    assert dropped(report) == {
        "tie": 1, "no_label": 1, "missing_file": 1, "identical_images": 1, "malformed_row": 4,
    }  # fmt: skip
    assert "pairs.csv row 2 (line 5)" in [bad["row"] for bad in report["bad_rows"]]  # row 0 takes two lines


def test_columns_and_preferred(tmp_path, images):
    lines = [
        "prompt\tleft\tright\tbetter", "p\tred.png\tblue.png\tleft", "p\tred.png\tblue.png\t1",
        "p\tred.png\tblue.png\ttie", "p\tred.png\tblue.png\tnobody", "p\tred.png\tblue.png\t",
        "p\tred.png\tblue.png\timage_0",
    ]  # fmt: skip
    (images / "a.tsv").write_text("\n".join(lines))
    names = {"caption": "prompt", "image_0": "left", "image_1": "right", "preferred": "better"}
    report, kept = run(images / "a.tsv", tmp_path / "out", columns=names)
    assert [r["label_0"] for r in kept] == [1.0, 0.0, 1.0]
    assert dropped(report) == {"tie": 1, "bad_label": 1, "no_label": 1}
    text = error(images / "a.tsv", tmp_path / "no", columns={"caption": "prompts"})
    assert "no column 'prompts'" in text
    assert "--columns caption=prompt" in text
    assert "nor 'preferred'" in error(
        images / "a.tsv", tmp_path / "no", columns=dict(list(names.items())[:3])
    )


def test_label_and_preferred_must_agree(tmp_path, images):
    entries = [pair(preferred="image_0"), pair(preferred=1), pair(label_1=1), pair(label_1="0.0")]
    report, kept = run(jsonl(images / "a.jsonl", entries), tmp_path / "out")
    assert [r["source_row"] for r in kept] == [0, 3]
    assert dropped(report) == {"bad_label": 2}


def test_paths_never_leave_the_folder_of_the_images(tmp_path, images):
    (tmp_path / "secret.png").write_bytes(GREEN)
    (tmp_path / "images-too").mkdir()
    (tmp_path / "images-too" / "a.png").write_bytes(GREEN)
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "inside.png").symlink_to(images / "green.png")
    os.mkfifo(images / "pipe.png")
    paths = [
        "../secret.png", str(tmp_path / "secret.png"), "link.png", "../images-too/a.png",
        "a/../../secret.png", "pipe.png", ".", "nul\0.png", "\udc80.png", "x" * 5000,
        "inside.png", str(images / "green.png"), "../images/green.png", "./green.png",
    ]  # fmt: skip
    source = jsonl(images / "a.jsonl", [pair(image_1=path) for path in paths])
    report, kept = run(source, tmp_path / "out")
    assert [r["source_row"] for r in kept] == [10, 11, 12, 13]
    assert all(r["jpg_1"] == GREEN for r in kept)
    assert dropped(report) == {"outside_images": 5, "missing_file": 5}
    elsewhere = jsonl(tmp_path / "b.jsonl", [pair(), pair(image_1="secret.png")])
    report, kept = run(elsewhere, tmp_path / "out2", images=images)
    assert dropped(report) == {"missing_file": 1}


def folders(place: Path) -> Path:
    for side, names in {
        "w": ("a.png", "b.png", "only-w.png", "deep/c.v1.png"),
        "l": ("a.jpg", "b.png", "deep/c.v1.webp", "b.jpg"),
    }.items():  # fmt: skip
        for name in names:
            path = place / side / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(RED if side == "w" else BLUE)
    (place / "w" / ".DS_Store").write_bytes(b"x")
    return place


CAPTIONS = {
    "captions.txt": "a.png\tA, ü\nb\tB\ndeep/c.v1\tC\nnobody\tN\nno tab\n",
    "captions.csv": 'file_name,prompt\na,"A, ü"\nb,B\ndeep/c.v1,C\nnobody.png,N\n,x\n',
    "captions.jsonl": '{"name": "a.png", "caption": "A, ü"}\n{"name": "deep/c.v1.png", "caption": "C"}\n'
    '{"name": "b", "text": "B"}\n{"name": "nobody", "caption": "N"}\n{"caption": "x"}\n',
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_folders_with_a_file_of_captions(tmp_path, name):
    place = folders(tmp_path / "pairs")
    (place / name).write_text(CAPTIONS[name], encoding="utf-8")
    report, kept = run(place, tmp_path / "out")
    assert [(r["source_file"], r["caption"], r["label_0"]) for r in kept] == [
        ("w/a.png", "A, ü", 1.0), ("w/deep/c.v1.png", "C", 1.0),
    ]  # fmt: skip
    assert (kept[0]["jpg_0"], kept[0]["jpg_1"]) == (RED, BLUE)
    assert report["rows"] == 6
    # only-w and nobody lack images; l holds b twice; one row of the captions is no use
    assert dropped(report) == {"missing_file": 2, "malformed_row": 2}


def test_folders_with_texts_beside(tmp_path):
    place = folders(tmp_path / "pairs")
    (place / "l" / "b.jpg").unlink()
    (place / "w" / "a.txt").write_text("A\n")
    (place / "b.txt").write_bytes(b"\xff")
    report, kept = run(place, tmp_path / "out")
    assert [r["caption"] for r in kept] == ["A"]
    assert dropped(report) == {"missing_file": 1, "no_caption": 1, "malformed_row": 1}


HEADER, PAIR = "caption,image_0,image_1,label_0\n", "p,red.png,blue.png,1\n"


def test_a_quote_that_is_never_closed_names_the_lines_it_swallows(tmp_path, images):
    (images / "a.csv").write_text(HEADER + PAIR + '"p,red.png,blue.png,1\n' + PAIR * 3)
    report, kept = run(images / "a.csv", tmp_path / "out")
    assert len(kept) == 1
    assert report["bad_rows"][0]["row"] == "a.csv row 1 (lines 3 to 6)"


def test_blank_lines_before_the_header(tmp_path, images):
    (images / "a.csv").write_text("\n\n" + HEADER + "\n" + PAIR)
    assert len(run(images / "a.csv", tmp_path / "out")[1]) == 1


@pytest.mark.parametrize(("name", "text"), [
    ("a.csv", "a.csv is not UTF-8"), ("a.jsonl", "row 0 (line 1): the line is not UTF-8"),
])  # fmt: skip
def test_utf16_is_told(tmp_path, name, text):
    (tmp_path / name).write_bytes((HEADER + PAIR).encode("utf-16"))
    assert text in error(tmp_path / name, tmp_path / "out")


def test_an_empty_list(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    assert "it is empty" in error(tmp_path / "a.jsonl", tmp_path / "out")
