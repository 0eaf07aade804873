"""Benchmarks in the form their authors publish them, with texts of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.cli import main
from diffpref.errors import UserError
from diffpref.generation import read_manifest, read_rows
from diffpref.prompt_lists import read_prompts
from diffpref.suites import load_suite

SETTINGS = {"steps": 2, "guidance": 3.0, "width": 64, "height": 32}
ROOT = Path(__file__).parents[2]


def parti(folder: Path) -> Path:
    path = folder / "PartiPrompts.tsv"
    path.write_text(
        "Prompt\tCategory\tChallenge\tNote\n"
        "a red cup\tProduce & Plants\tBasic\tnone\n"
        'a "blue" cup\tAnimals\tQuantity\t\n'
    )
    return path


def hpdv2(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folder / f"{style}.json").write_text(json.dumps([f"a {style} cup", f"two {style} cups"]))
    return folder


def drawbench(folder: Path) -> Path:
    path = folder / "drawbench.csv"
    path.write_text('Prompts,Category\n"A cup, red.",Colors\nTwo cups.,Counting\n')
    return path


def geneval(folder: Path) -> Path:
    path = folder / "evaluation_metadata.jsonl"
    rows = [
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
        {"tag": "colors", "include": [{"class": "cup", "color": "red"}], "prompt": "a photo of a red cup"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pick_a_pic(folder: Path) -> Path:
    path = folder / "test_unique-00000-of-00001.parquet"
    columns = {"caption": ["a cup", "a cat"], "jpg_0": [b"x", b"y"], "jpg_1": [b"x", b"y"], "label_0": [1, 0]}
    pq.write_table(pa.table(columns), path)
    return path


CASES = {
    "parti": (parti, [("a red cup", "Produce & Plants"), ('a "blue" cup', "Animals")]),
    "drawbench": (drawbench, [("A cup, red.", "Colors"), ("Two cups.", "Counting")]),
    "geneval": (geneval, [("a photo of two cups", "counting"), ("a photo of a red cup", "colors")]),
    "pick-a-pic": (pick_a_pic, [("a cup", "all"), ("a cat", "all")]),
    "hpdv2": (
        lambda folder: hpdv2(folder / "benchmark"),
        [
            (text.format(style), style)
            for style in ("anime", "concept-art", "paintings", "photo")
            for text in ("a {} cup", "two {} cups")
        ],
    ),
}


@pytest.mark.parametrize("form", CASES)
def test_a_benchmark_is_read_by_name_and_by_its_content(form: str, tmp_path: Path) -> None:
    make, expected = CASES[form]
    path = make(tmp_path)
    assert read_prompts(str(path), form) == expected
    assert read_prompts(str(path)) == expected
    suite = load_suite(f"{form}:{path}", SETTINGS)
    assert [(p.text, p.kind) for p in suite.prompts] == expected
    assert (suite.name, suite.height, suite.seeds) == (form, 32, (0,))
    same = load_suite(str(path), {**SETTINGS, "name": form})
    assert same.fingerprint() == suite.fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "a cup\n\n  a cat \n", [("a cup", "all"), ("a cat", "all")]),
        ("p.json", '["a cup", "a cat"]', [("a cup", "all"), ("a cat", "all")]),
        ("p.json", '[{"caption": "a cup", "kind": "x"}]', [("a cup", "x")]),
        (
            "p.jsonl",
            '{"prompt": "a cup", "category": "x"}\n{"prompt": "b"}\n',
            [("a cup", "x"), ("b", "all")],
        ),
        ("p.csv", "text,kind\na cup,x\nb,\n", [("a cup", "x"), ("b", "all")]),
        ("p.tsv", "\ufeffprompt\na cup\n", [("a cup", "all")]),
    ],
)
def test_plain_lists(name: str, content: str, expected: list, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_prompts(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "form", "words"),
    [
        ("p.tsv", "Text\tCategory\na\tb\n", "parti", ["no column Prompt", "Text, Category"]),
        ("p.csv", "words\na\n", "auto", ["no column", "words"]),
        ("p.csv", "prompt,kind\na,x\n,y\n", "auto", ["row 1 has no prompt"]),
        ("p.json", '{"a": 1}', "auto", ["neither texts nor objects"]),
        ("p.json", "[", "auto", ["not JSON"]),
        ("p.jsonl", "[1]\n", "auto", ["line 1 is not an object"]),
        ("p.txt", "\n", "auto", ["holds no prompts"]),
        ("p.pdf", "x", "auto", ["known endings"]),
        ("p.txt", "a\n", "partti", ["did you mean 'parti'"]),
    ],
)
def test_what_is_wrong_with_a_list_is_said(
    name: str, content: str, form: str, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as raised:
        read_prompts(str(tmp_path / name), form)
    for word in words:
        assert word in str(raised.value)


def test_a_missing_style_of_hpdv2_is_named(tmp_path: Path) -> None:
    folder = hpdv2(tmp_path / "benchmark")
    (folder / "photo.json").unlink()
    with pytest.raises(UserError, match=r"missing: photo \(.json\)"):
        read_prompts(str(folder))


def test_a_dataset_of_the_hub_from_its_cache(tmp_path: Path) -> None:
    """What an earlier download left, without network; a path that is not there is not taken for a hub id."""
    place = tmp_path / "hub" / "datasets--some--parti"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    snapshot = place / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    parti(snapshot)
    code = "import sys; from diffpref.prompt_lists import read_prompts; print(read_prompts(*sys.argv[1:]))"
    environ = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def read(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)

    done = read("some/parti", "parti")
    assert done.returncode == 0, done.stderr
    assert "a red cup" in done.stdout
    assert "neither here nor on the hub" in read("some/other", "parti").stderr
    assert "such as parti:some/parti" in read("some/parti").stderr


def suite_file(folder: Path, text: str) -> Path:
    path = folder / "suite.toml"
    path.write_text("steps = 2\nguidance = 3\nwidth = 64\nheight = 64\nseeds = [0, 3]\n" + text)
    return path


def test_a_toml_suite_points_to_its_prompts(tmp_path: Path) -> None:
    parti(tmp_path)
    path = suite_file(tmp_path, 'prompts_file = "PartiPrompts.tsv"\nkind_column = "Challenge"\n')
    suite = load_suite(path)
    assert [(p.text, p.kind) for p in suite.prompts] == [("a red cup", "Basic"), ('a "blue" cup', "Quantity")]
    assert len(suite.images()) == 4
    assert suite.settings().keys() == load_suite("tiny").settings().keys()
    assert load_suite(path, {"steps": 5, "seeds": [1]}).steps == 5
    with pytest.raises(UserError, match="from 1 to 1000"):
        load_suite(path, {"steps": 5000})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('prompts_file = "nothing.tsv"\n', "does not exist"),
        ('format = "parti"\n[[prompts]]\ntext = "a"\n', "no effect without prompts_file"),
        ('prompts_file = "PartiPrompts.tsv"\n[[prompts]]\ntext = "a"\n', "keep one of them"),
        ('prompts_file = "PartiPrompts.tsv"\nkind_column = "Chalenge"\n', "did you mean 'Challenge'"),
        ('prompts_file = "PartiPrompts.tsv"\nkinds = "x"\n', "unknown key"),
    ],
)
def test_mistakes_in_a_toml_suite_of_a_list(text: str, words: str, tmp_path: Path) -> None:
    parti(tmp_path)
    with pytest.raises(UserError, match=words):
        load_suite(suite_file(tmp_path, text))


def test_a_prompt_that_repeats_is_drawn_once_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "p.txt").write_text("a cup\na cat\na cup\n")
    assert [p.text for p in load_suite(tmp_path / "p.txt", SETTINGS).prompts] == ["a cup", "a cat"]
    assert "1 of 3 prompts stand there more than once" in caplog.text


def test_a_list_wants_its_sampler_settings(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cup\n")
    with pytest.raises(UserError, match="give --guidance, --size"):
        load_suite(tmp_path / "p.txt", {"steps": 3})


def test_a_list_is_drawn_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    command = ["generate", "--model", "tiny:model", "--suite", str(tmp_path / "p.txt"), "--limit", "1"]
    options = ["--steps", "1", "--guidance", "1.5", "--size", "64x32", "--seeds", "0,7"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert main([*command, "--out", str(tmp_path / "out"), *options, "--negative-prompt", "blurred"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest["suite"] == {
        "name": "p", "scheduler": "ddim", "steps": 1, "guidance": 1.5, "width": 64, "height": 32,
        "negative_prompt": "blurred", "seeds": [0, 7],
    }  # fmt: skip
    assert [row["id"] for row in read_rows(tmp_path / "out")] == ["00000-s0", "00000-s7"]
    # what the report prints draws the same again
    again = [*command, "--out", str(tmp_path / "again"), *manifest["suite_options"]]
    assert main(again) == 0
    for row in read_rows(tmp_path / "out"):
        assert (tmp_path / "again" / row["file"]).read_bytes() == (
            tmp_path / "out" / row["file"]
        ).read_bytes()


def test_quotes_of_a_tsv_are_kept_unless_they_enclose_a_whole_cell(tmp_path: Path) -> None:
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(
        "Prompt\tCategory\tChallenge\tNote\n"
        '"C U P" painted on a wall\tArts\tBasic\t\n'
        '"a ""red"" cup"\tArts\tBasic\t\n'
        '"a cup that is never closed\tArts\tBasic\t\n'
        "\na cup\tArts\n"
    )
    texts = ['"C U P" painted on a wall', 'a "red" cup', '"a cup that is never closed', "a cup"]
    assert read_prompts(str(path), "parti") == [(text, "Arts") for text in texts]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", 'prompt,kind\n"a cup,x\ntwo cups,x\n', "line 3: unexpected end of data"),
        ("a.csv", 'prompt,kind\n"C U P" on a wall,x\n', "line 2: "),
        ("a.csv", "prompt,kind\nA cup, red.,x\n", "line 2 has more cells"),
        ("a.jsonl", '{"prompt": "a cup"}\n{"prompt": \n', "line 2: "),
    ],
)
def test_damaged_lines_are_named_and_no_prompt_is_cut_or_swallowed(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_prompts(str(tmp_path / name))
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["A.TSV", "A.JSONL", "A.JSON", "A.PARQUET"])
def test_endings_may_be_in_capitals(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "A.PARQUET":
        pq.write_table(pa.table({"prompt": ["a cup"]}), path)
    else:
        texts = {"A.TSV": "prompt\tnote\na cup\tx\n", "A.JSONL": '{"prompt": "a cup"}', "A.JSON": '["a cup"]'}
        path.write_text(texts[name])
    assert read_prompts(str(path)) == [("a cup", "all")]
