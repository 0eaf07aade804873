"""Reports over several evaluators: missing scores, forced comparisons, published tables, LaTeX, Markdown."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.errors import UserError
from diffpref.evaluators import Column
from diffpref.reporting.distributions import histograms
from diffpref.reporting.latex import escape, latex_table
from diffpref.reporting.report import write_report
from diffpref.reporting.tables import markdown_table
from diffpref.suites import load_suite
from tests.report_folders import add_scores, scored_folder

LOST = ("00003-s0", "00003-s1", "00010-s1")  # a whole prompt, and one of two seeds


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("metrics")
    add_scores(scored_folder(root / "base_50%", 0.4), seed=1)
    add_scores(scored_folder(root / "dpo & co", 0.8), seed=2, missing=LOST)
    return root


@pytest.fixture(scope="module")
def report(root: Path) -> dict:
    return write_report(
        root / "base_50%",
        [root / "dpo & co"],
        root / "r.html",
        latex=root / "r.tex",
        markdown=root / "r.md",
        resamples=2000,
    )


@pytest.fixture(scope="module")
def page(root: Path, report: dict) -> str:
    return (root / "r.html").read_text()


def test_images_without_scores_are_left_out_of_every_model_and_counted(
    root: Path, report: dict, page: str
) -> None:
    kept = {
        name: [
            row for row in pq.read_table(root / name / "scores.parquet").to_pylist() if row["id"] not in LOST
        ]
        for name in ("base_50%", "dpo & co")
    }
    assert (report["prompt_count"], report["image_count"]) == (23, 45)
    for name, rows in kept.items():
        by_prompt: dict[int, list[float]] = {}
        for row in rows:
            by_prompt.setdefault(row["prompt_id"], []).append(row["pickscore"])
        mean = np.mean([np.mean(values) for values in by_prompt.values()])
        assert report["results"][name]["pickscore"]["mean"] == pytest.approx(mean)
    assert report["missing"]["left_out_images"] == 3
    assert report["missing"]["left_out_prompts"] == 1
    assert [image["id"] for image in report["missing"]["images"]["dpo & co"]] == list(LOST)
    assert report["missing"]["images"]["base_50%"] == []
    assert any("3 images are left out of every model and 1 prompt with them" in n for n in report["notes"])
    assert page.count('<div class="absent">') == 3
    assert "no scores: the file is missing" in page
    assert all(prompt["id"] != 3 for prompt in report["prompts"])
    score_commands = [line for line in report["commands"] if line.startswith("diffpref score")]
    assert ["--allow-missing" in line for line in score_commands] == [False, True]


def test_a_comparison_without_any_common_image_is_refused(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "dpo & co", tmp_path / "empty"))
    table = pq.read_table(folder / "scores.parquet")
    nothing = table.set_column(
        table.column_names.index("pickscore"), "pickscore", pa.nulls(len(table), pa.float32())
    )
    pq.write_table(nothing, folder / "scores.parquet")
    with pytest.raises(UserError, match="nothing to compare"):
        write_report(root / "base_50%", [folder], tmp_path / "r.html")


def test_a_metric_where_lower_is_better_counts_the_other_way_round(root: Path, report: dict) -> None:
    cell = report["results"]["dpo & co"]["badness"]
    assert cell["better"] == (cell["difference"] < 0)
    by_prompt = {prompt["id"]: prompt["scores"] for prompt in report["prompts"]}
    fell = sum(s["dpo & co"]["badness"] < s["base_50%"]["badness"] - 1e-6 for s in by_prompt.values())
    assert cell["wins"] == fell
    best = report["extremes"]["badness"]["dpo & co"]["best"][0]
    scores = by_prompt[best["id"]]
    assert best["gain"] == pytest.approx(scores["base_50%"]["badness"] - scores["dpo & co"]["badness"])
    assert best["gain"] == max(
        s["base_50%"]["badness"] - s["dpo & co"]["badness"] for s in by_prompt.values()
    )


def test_a_metric_over_kinds_is_the_mean_of_the_kinds_means(root: Path, tmp_path: Path) -> None:
    """As GenEval's total: a kind with a fifth of the prompts counts as much as the other."""
    folders = []
    for name, easy in (("base_50%", 0.0), ("dpo & co", 1.0)):
        folder = Path(shutil.copytree(root / name, tmp_path / name))
        table = pq.read_table(folder / "scores.parquet")
        kinds = ["easy" if prompt < 6 else "hard" for prompt in table["prompt_id"].to_pylist()]
        values = pa.array([easy if kind == "easy" else 0.5 for kind in kinds], pa.float32())
        table = table.set_column(table.column_names.index("kind"), "kind", pa.array(kinds))
        kept = table.select([c for c in table.column_names if not c.startswith("oracle")])
        for column in ("plain", "tasks"):
            kept = kept.append_column(column, values)
        pq.write_table(kept, folder / "scores.parquet")
        about = {
            column: {
                "version": "1", "scale": "0 to 1", "higher_is_better": True, "fingerprint": "f",
                "columns": {column: asdict(Column(column, "a share", over_kinds=column == "tasks"))},
            }
            for column in ("plain", "tasks")
        }  # fmt: skip
        (folder / "scores.json").write_text(json.dumps({"evaluators": about}))
        folders.append(folder)
    report = write_report(folders[0], [folders[1]], tmp_path / "r.html")
    plain, tasks = (report["results"]["dpo & co"][column] for column in ("plain", "tasks"))
    # the sixth easy prompt has no images in one folder, so 5 of 23 are left
    assert (plain["mean"], plain["difference"]) == pytest.approx((14 / 23, 5 / 23))
    assert (tasks["mean"], tasks["difference"]) == pytest.approx((0.75, 0.5))
    assert report["results"]["base_50%"]["tasks"]["mean"] == pytest.approx(0.25)
    low, high = tasks["difference_interval"]
    # within a kind nothing varies, so that only a resample without one of the kinds moves the mean
    assert low == pytest.approx(0.5, abs=1e-6)
    assert high == pytest.approx(0.5, abs=1e-6)
    assert plain["difference_interval"][1] - plain["difference_interval"][0] > 0.1
    assert tasks["wins"] == plain["wins"] == 5
    part = report["kinds"]["easy"]["results"]["dpo & co"]["tasks"]
    assert (part["mean"], part["difference"]) == (1.0, 1.0)
    text = " ".join((tmp_path / "r.html").read_text().split())
    assert "Of tasks: the mean over the prompts of each kind first, then over the kinds." in text


def test_histograms_count_every_prompt_once() -> None:
    base, other = np.array([0.0, 1.0, 2.0, 10.0]), np.array([0.0, 3.0, 1.0, 10.5])
    found = histograms({"a": base, "b": other}, {"b": other - base})
    assert sum(found["scores"]["counts"]["a"]) == sum(found["scores"]["counts"]["b"]) == 4
    assert (found["scores"]["edges"][0], found["scores"]["edges"][-1]) == (0.0, 10.5)
    assert found["scores"]["quartiles"]["a"][1] == 1.5
    counts = found["gains"]["counts"]["b"]
    middle = len(counts) // 2
    assert found["gains"]["edges"][middle] == pytest.approx(-found["gains"]["edges"][middle + 1])
    assert (sum(counts[:middle]), counts[middle], sum(counts[middle + 1 :])) == (1, 1, 2)
    flat = histograms({"a": np.ones(3), "b": np.ones(3)}, {"b": np.zeros(3)})
    assert flat["scores"]["counts"]["a"] == [3]
    assert max(flat["gains"]["counts"]["b"]) == 3


def test_published_tables_stand_only_beside_metrics_that_are_there(report: dict, page: str) -> None:
    names = {metric["name"] for table in report["published"] for metric in table["metrics"]}
    assert names == {"pickscore", "hps-v2.1"}
    table = next(table for table in report["published"] if "LPO" in table["source"])
    assert {"model": "SDXL, Diffusion-DPO", "values": [22.22, 28.47]} in table["rows"]
    own = next(row["values"] for row in table["own"] if row["model"] == "base_50%")
    mean = report["results"]["base_50%"]["hps-v2.1"]["mean"]
    assert own[1] == pytest.approx(100 * mean)  # published as the cosine times 100
    assert "Do not compare across these tables" in page
    assert "20 steps" in table["protocol"]


def test_the_commands_draw_the_same_images_again(root: Path, tmp_path: Path) -> None:
    """A part of a shipped suite with its own settings, judged in half precision by other weights."""
    suite = load_suite("tiny-demo", {"steps": 9})
    folders = []
    for name in ("base_50%", "dpo & co"):
        folder = Path(shutil.copytree(root / name, tmp_path / name))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest |= {"suite": suite.settings(), "suite_fingerprint": suite.fingerprint(), "dtype": "fp16"}
        manifest |= {"suite_source": "tiny-demo", "suite_options": ["--steps", "9"], "lora": "my lora"}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        about = json.loads((folder / "scores.json").read_text())
        about["evaluators"]["pickscore"] |= {"dtype": "bf16", "device": "cuda", "weights": "my weights"}
        (folder / "scores.json").write_text(json.dumps(about))
        folders.append(folder)
    report = write_report(folders[0], [folders[1]], tmp_path / "r.html", resamples=100)
    assert report["commands"][0] == (
        "diffpref generate --model base --lora 'my lora' --suite tiny-demo --steps 9 --limit 24 --device cpu "
        f"--dtype fp16 --out {folders[0]}"
    )
    scored = [line for line in report["commands"] if line.startswith("diffpref score") and "base_50" in line]
    assert scored == [
        f"diffpref score {folders[0]} --evaluators oracle,hps-v2.1,badness --device cpu",
        f"diffpref score {folders[0]} --evaluators pickscore --weights 'pickscore=my weights' "
        "--device cuda --dtype bf16",
    ]


def test_a_forced_comparison_shows_what_differs_first(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "dpo & co", tmp_path / "dpo"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["suite"] |= {"steps": 50, "scheduler": "euler"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"suite\.steps: 20 -> 50(.|\n)*--force"):
        write_report(root / "base_50%", [folder], tmp_path / "r.html")
    forced = write_report(root / "base_50%", [folder], tmp_path / "r.html", force=True, resamples=500)
    assert any("suite.steps: 20 -> 50" in line for line in forced["setting_differences"])
    page = (tmp_path / "r.html").read_text()
    assert page.index("suite.scheduler: ddim -&gt; euler") < page.index('<section id="results">')
    assert "every model starts from the same noise" not in page
    assert forced["commands"][-1].count("--force") == 1


def test_the_latex_table_is_escaped_bold_and_says_its_protocol(root: Path, report: dict) -> None:
    text = (root / "r.tex").read_text()
    assert text == latex_table(report)
    assert r"dpo \& co" in text
    assert r"base\_50\%" in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(("\\\\", "\\addlinespace"))]
    assert len(rows) == 4  # means and intervals of two models
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(report["metrics"]) + 1}
    assert text.count(r"\textbf{") >= len(report["metrics"])
    higher = max(("base_50%", "dpo & co"), key=lambda name: report["results"][name]["pickscore"]["mean"])
    best = f"{report['results'][higher]['pickscore']['mean']:.{report['metrics']['pickscore']['decimals']}f}"
    assert rf"\textbf{{{best}}}" in text
    for part in (
        "23 prompts",
        "45 images per model",
        "DDIM, 20 steps",
        "guidance 5",
        "pickscore version 1",
        "Holm",
    ):
        assert part in text, part
    assert r"\toprule" in text


def test_latex_escapes_every_special_character() -> None:
    assert escape(r"a_b & 50% {x} #1 ~^ \ $5 < 6") == (
        r"a\_b \& 50\% \{x\} \#1 \textasciitilde{}\textasciicircum{} \textbackslash{} \$5 \textless{} 6"
    )


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_the_latex_table_compiles(root: Path, report: dict, tmp_path: Path) -> None:
    if (
        not shutil.which("kpsewhich")
        or not subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).stdout
    ):
        pytest.skip("the LaTeX package booktabs is not installed")
    shutil.copy(root / "r.tex", tmp_path / "r.tex")
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{r.tex}\end{document}"
    (tmp_path / "d.tex").write_text(document)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "d.tex"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]


def test_the_markdown_file_has_the_main_table_and_one_for_each_metric(root: Path, report: dict) -> None:
    text = (root / "r.md").read_text()
    assert markdown_table(report) in text
    assert text.count("by kind of prompt") == len(report["metrics"])
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    assert len(tables) == 1 + len(report["metrics"])
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}) == 1
    assert "| Badness ↓ |" in text
    assert any(note in text for note in report["notes"])


def test_paths_and_sizes_that_cannot_be_are_named_before_any_work(root: Path, tmp_path: Path) -> None:
    base, dpo = root / "base_50%", [root / "dpo & co"]
    with pytest.raises(UserError, match=r"--latex must end in \.tex"):
        write_report(base, dpo, tmp_path / "r.html", latex=tmp_path / "t.txt")
    with pytest.raises(UserError, match=r"--markdown must end in \.md"):
        write_report(base, dpo, tmp_path / "r.html", markdown=tmp_path / "t")
    with pytest.raises(UserError, match=r"--image-megabytes must be above 0"):
        write_report(base, dpo, tmp_path / "r.html", image_megabytes=0)
    assert list(tmp_path.iterdir()) == []
