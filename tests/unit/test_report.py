from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import stats as scipy_stats

from diffpref.errors import UserError
from diffpref.reporting.comparison import compare
from diffpref.reporting.loading import ScoredFolder, _series, load_folders
from diffpref.reporting.pictures import build_grid
from diffpref.reporting.report import write_report
from diffpref.reporting.tables import headline, markdown_table
from diffpref.reporting.thumbnails import embed
from tests.pages import Page
from tests.report_folders import scored_folder, training_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    scored_folder(root / "base", 0.4)
    for name, skill in (("dpo", 0.8), ("sft", 0.4)):
        scored_folder(root / name, skill, run=training_run(root / "runs" / name, reference=name == "dpo"))
    write_report(root / "base", [root / "dpo", root / "sft"], root / "report.html", title="A <title>")
    return root


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "report.html").read_text()


@pytest.fixture(scope="module")
def report(root: Path) -> dict:
    return json.loads((root / "report.json").read_text())


def by_prompt(folder: Path, column: str) -> np.ndarray:
    """Per-prompt means by another path than the report's: a plain loop over rows."""
    sums: dict[int, list[float]] = {}
    for row in pq.read_table(folder / "scores.parquet").to_pylist():
        sums.setdefault(row["prompt_id"], []).append(row[column])
    return np.array([np.mean(sums[key]) for key in sorted(sums)])


@pytest.mark.parametrize("metric", ["oracle", "oracle.facts", "oracle.style", "oracle.all_correct"])
def test_every_number_equals_an_independent_computation(root: Path, report: dict, metric: str) -> None:
    base, dpo = by_prompt(root / "base", metric), by_prompt(root / "dpo", metric)
    cell = report["results"]["dpo"][metric]
    assert report["results"]["base"][metric]["mean"] == pytest.approx(base.mean())
    assert cell["mean"] == pytest.approx(dpo.mean())
    assert cell["difference"] == pytest.approx((dpo - base).mean())
    wins, losses = int((dpo - base > 1e-6).sum()), int((base - dpo > 1e-6).sum())
    ties = len(base) - wins - losses
    assert (cell["wins"], cell["ties"], cell["losses"]) == (wins, ties, losses)
    assert cell["win_rate"] == (wins + ties / 2) / 24
    theirs = scipy_stats.bootstrap(
        (dpo - base,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    assert cell["difference_interval"] == pytest.approx(
        (theirs.low, theirs.high), abs=0.021
    )  # a step is 1 of 48


def test_kinds_and_prompts_are_in_the_json(root: Path, report: dict) -> None:
    assert report["prompt_count"] == 24
    assert report["image_count"] == 48
    assert sum(part["prompts"] for part in report["kinds"].values()) == 24
    assert len(report["kinds"]) == 6
    dpo = by_prompt(root / "dpo", "oracle")
    scores = [prompt["scores"]["dpo"]["oracle"] for prompt in report["prompts"]]
    assert scores == pytest.approx(list(dpo))
    images = [image for prompt in report["prompts"] for image in prompt["images"]]
    rows = {row["id"]: row["oracle"] for row in pq.read_table(root / "dpo" / "scores.parquet").to_pylist()}
    assert {image["id"]: image["scores"]["dpo"]["oracle"] for image in images} == rows
    kinds = np.array([prompt["kind"] for prompt in report["prompts"]])
    for kind, part in report["kinds"].items():
        assert part["results"]["dpo"]["oracle"]["mean"] == pytest.approx(dpo[kinds == kind].mean())


def test_a_better_model_is_called_better_and_an_equal_one_not(report: dict) -> None:
    assert report["results"]["dpo"]["oracle"]["verdict"] == "better"
    assert report["results"]["dpo"]["oracle"]["win_rate_interval"][0] > 0.5
    sft = report["results"]["sft"]["oracle"]
    assert (sft["difference"], sft["p"], sft["verdict"]) == (0.0, 1.0, "no clear difference")
    assert report["headline"] == "1 of 2 models is better than base in mean utility; dpo gains the most."
    assert any("sft has exactly the weights of base" in note for note in report["notes"])


def test_headline_tells_small_frequent_gains_from_none() -> None:
    """A mean can hide that most prompts got a little better while a few got much worse."""

    def cell(wins: str) -> dict[str, object]:
        return {"verdict": "no clear difference", "difference": 0.0, "win_verdict": wins}

    report = {
        "candidates": ["dpo", "sft", "mapo"],
        "baseline": "base",
        "primary": "oracle",
        "metrics": {"oracle": {"label": "Utility"}},
        "results": {
            "dpo": {"oracle": cell("better")},
            "sft": {"oracle": cell("no clear difference")},
            "mapo": {"oracle": cell("worse")},
        },
    }
    none = "None of the 3 models is clearly better than base in mean utility"
    wins = "yet dpo wins more prompts than base and mapo loses more prompts to base"
    assert headline(report) == f"{none}, {wins}."
    report["candidates"] = ["dpo"]
    report["results"] = {"dpo": report["results"]["dpo"]}
    assert headline(report) == (
        "No clear difference in mean utility between dpo and base, yet dpo wins more prompts than base."
    )
    report["results"]["dpo"]["oracle"] |= {"verdict": "better"}
    assert headline(report) == "dpo is better than base in mean utility."
    report["results"]["dpo"]["oracle"] |= {"win_verdict": "worse"}
    assert headline(report) == (
        "dpo is better than base in mean utility, yet dpo loses more prompts to base."
    )


def test_holm_runs_over_means_and_win_rates_of_all_candidates_and_metrics(report: dict) -> None:
    cells = [report["results"][name][metric] for name in ("dpo", "sft") for metric in report["metrics"]]
    raw = [cell[key] for key in ("p", "win_rate_p") for cell in cells]
    corrected = [cell[f"{key}_holm"] for key in ("p", "win_rate_p") for cell in cells]
    assert len(raw) == 16
    assert min(corrected) == pytest.approx(min(1.0, 16 * min(raw)))
    assert all(adjusted >= p for adjusted, p in zip(corrected, raw, strict=True))


REPORTS = 120


def compared(
    values: np.ndarray, kinds: list[str] | None = None, resamples: int = 400, **column: object
) -> dict[str, Any]:
    """A report on values [models, prompts] of one metric; the first model is the baseline."""
    described = {"judge": {"columns": {"m": {"label": "M", "meaning": "", **column}}}}
    prompts = values.shape[1]
    rows = [
        [
            {
                "id": f"{k}", "prompt_id": k, "prompt": f"p{k}", "seed": 0, "m": float(value),
                "kind": kinds[k] if kinds else "a",
            }
            for k, value in enumerate(model)
        ]
        for model in values
    ]  # fmt: skip
    assert len(rows[0]) == prompts
    folders = [ScoredFolder(Path(f"{n}"), f"model {n}", {}, described, model) for n, model in enumerate(rows)]
    return compare(folders, resamples=resamples)


def test_a_mean_and_a_win_rate_each_have_their_own_test() -> None:
    """31 of 40 prompts gain a little, 9 lose much: the mean is unclear, the wins are not."""
    gains = np.r_[np.full(31, 0.1), np.full(9, -0.4)]
    cell = compared(np.stack([np.zeros(40), gains]), resamples=10_000)["results"]["model 1"]["m"]
    assert cell["verdict"] == "no clear difference"
    sign_test = 2 * sum(math.comb(40, k) for k in range(10)) / 2**40
    assert cell["win_rate_p"] == pytest.approx(sign_test)
    assert cell["win_rate_p_holm"] == pytest.approx(2 * sign_test)
    assert cell["win_verdict"] == "better"
    assert cell["p"] > 0.5


@pytest.mark.parametrize(("wins", "ends"), [(20, (0.8389, 1.0)), (0, (0.0, 0.1611)), (19, (0.7639, 0.9911))])
def test_the_interval_of_a_win_rate_is_never_narrower_than_wilsons(
    wins: int, ends: tuple[float, float]
) -> None:
    """Wilson's of 20, 0 and 19 of 20 by hand: (k + 1.92) / (n + 3.84) -+ ..."""
    gains = np.r_[np.ones(wins), -np.ones(20 - wins)]
    low, high = compared(np.stack([np.zeros(20), gains]))["results"]["model 1"]["m"]["win_rate_interval"]
    assert low <= ends[0] + 1e-4
    assert high >= ends[1] - 1e-4
    if wins != 19:
        assert (low, high) == pytest.approx(ends, abs=1e-4)


def test_a_share_that_all_prompts_agree_on_has_an_interval_too() -> None:
    results = compared(np.ones((2, 20)), share=True)["results"]
    assert results["model 0"]["m"]["interval"] == pytest.approx([0.8389, 1.0], abs=1e-4)
    assert results["model 1"]["m"]["interval"] == pytest.approx([0.8389, 1.0], abs=1e-4)


def test_a_share_of_values_between_keeps_the_interval_of_its_spread() -> None:
    """All near 0.65: a coin's spread would be ten times as wide."""
    values = np.random.default_rng(0).normal(0.65, 0.02, size=(2, 20))
    low, high = compared(values, share=True)["results"]["model 0"]["m"]["interval"]
    assert high - low < 0.03


def test_one_prompt_has_no_interval_and_no_winner() -> None:
    report = compared(np.array([[0.0], [1.0]]))
    cell = report["results"]["model 1"]["m"]
    assert (cell["interval"], cell["difference_interval"], cell["win_rate_interval"]) == (None, None, None)
    assert cell["verdict"] == cell["win_verdict"] == "no clear difference"
    assert headline(report) == "No clear difference in mean M between model 1 and model 0."
    parts = compared(np.array([[0.0, 0, 0], [1, 2, 4]]), kinds=["a", "b", "b"])["kinds"]
    assert parts["a"]["results"]["model 1"]["m"]["difference_interval"] is None
    assert parts["b"]["results"]["model 1"]["m"]["difference_interval"] is not None


@pytest.mark.parametrize(("law", "prompts"), [("normal", 4), ("ties", 5), ("lognormal of both", 8)])
def test_equal_models_are_rarely_told_apart(law: str, prompts: int) -> None:
    """Four candidates as good as the baseline: any claim in at most 5 % of reports (3 sigma: 11 %)."""
    generator = np.random.default_rng(prompts)
    claims = 0
    for _ in range(REPORTS):
        values = generator.normal(size=(5, prompts))
        if law == "ties":
            values = np.where(generator.random((5, prompts)) < 0.7, 0.0, np.sign(values))
        elif law == "lognormal of both":
            values = np.exp(values)
        report = compared(values, resamples=50)
        cells = [report["results"][name]["m"] for name in report["candidates"]]
        named = any(
            cell[key] != "no clear difference" for cell in cells for key in ("verdict", "win_verdict")
        )
        assert named or headline(report) == ("None of the 4 models is clearly better than model 0 in mean M.")
        claims += named
    assert claims / REPORTS < 0.05 + 3 * math.sqrt(0.05 * 0.95 / REPORTS)


def test_best_and_worst_prompts_are_those_of_largest_difference(root: Path, report: dict) -> None:
    gain = by_prompt(root / "dpo", "oracle") - by_prompt(root / "base", "oracle")
    best = report["extremes"]["oracle"]["dpo"]["best"]
    assert [entry["gain"] for entry in best] == pytest.approx(sorted(gain, reverse=True)[:5])
    assert best[0]["id"] == int(gain.argmax())
    style = by_prompt(root / "dpo", "oracle.style") - by_prompt(root / "base", "oracle.style")
    assert report["extremes"]["oracle.style"]["dpo"]["worst"][0]["id"] == int(style.argmin())
    assert report["extremes"]["oracle"]["sft"] == {"best": [], "worst": []}


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            target = attributes.get(name, "data:")
            assert target.startswith(("data:", "#")), (tag, name, target[:60])
    assert "url(" not in page
    assert "@import" not in page
    assert "://" not in re.sub(r"data:image[^\"]*", "", page)


def test_the_page_can_be_read_without_eyes_or_mouse(page: str) -> None:
    parsed = Page(page)
    images = parsed.all("img")
    assert images
    assert all(image["alt"] for image in images)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {link["href"][1:] for link in parsed.all("a")}
    assert targets <= set(ids)
    assert parsed.all("html")[0]["lang"] == "en"
    assert all("aria-label" in svg for svg in parsed.all("svg"))


def test_the_grid_has_every_image_with_its_verdict(page: str, root: Path) -> None:
    parsed = Page(page)
    rows = [a for tag, a in parsed.elements if tag == "li" and a.get("id", "").startswith("row-")]
    assert len(rows) == 48
    assert page.count('<figure class="cell') == 48 * 3
    assert "A &lt;title&gt;" in page
    scores = {row["id"]: row["oracle"] for row in pq.read_table(root / "dpo" / "scores.parquet").to_pylist()}
    base = {row["id"]: row["oracle"] for row in pq.read_table(root / "base" / "scores.parquet").to_pylist()}
    data = json.loads(re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[0])
    assert data["models"] == ["base", "dpo", "sft"]
    for row in rows:
        by_model = data["scores"][row["data-id"]]
        assert by_model[0][data["primary"]] == base[row["data-id"]]
        assert by_model[1][data["primary"]] == scores[row["data-id"]]
    frames = re.findall(r'<figure class="cell (win|tie|loss)">', page)
    won = sum(scores[key] - base[key] > 1e-6 for key in base)
    lost = sum(base[key] - scores[key] > 1e-6 for key in base)
    assert frames.count("win") == won  # of dpo; sft equals the baseline
    assert (frames.count("loss"), frames.count("tie")) == (lost, 48 - won - lost + 48)


def test_training_curves_and_configs_are_shown(page: str, report: dict) -> None:
    training = page[page.index('<section id="training">') : page.index('<section id="setup">')]
    assert len(Page(training).all("svg")) == 4 + 1  # dpo logs all; sft here only its loss
    assert "beta = 2000.0" in page
    assert report["training"]["dpo"]["steps"] == 60
    assert report["training"]["dpo"]["last"]["implicit_accuracy"] > 0.6
    assert any(command.startswith("diffpref report --baseline") for command in report["commands"])
    assert sum("--suite scenes.toml" in command for command in report["commands"]) == 3


def test_the_markdown_table_has_a_line_per_model(report: dict) -> None:
    lines = markdown_table(report).splitlines()
    assert len(lines) == 2 + 3
    assert lines[2].startswith("| base | ")
    assert "win rate (Utility)" in lines[0]
    assert len({line.count("|") for line in lines}) == 1


def rewritten(root: Path, tmp_path: Path, change: dict) -> Path:
    folder = Path(shutil.copytree(root / "dpo", tmp_path / "changed"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["suite"].update(change)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_folders_of_other_settings_are_refused_with_the_differences(root: Path, tmp_path: Path) -> None:
    folder = rewritten(root, tmp_path, {"steps": 50, "scheduler": "euler"})
    with pytest.raises(UserError) as raised:
        write_report(root / "base", [folder], tmp_path / "r.html")
    assert "suite.steps: 20 -> 50" in str(raised.value)
    assert "suite.scheduler: ddim -> euler" in str(raised.value)
    assert not (tmp_path / "r.html").exists()


def test_folders_of_other_prompts_or_evaluators_are_refused(root: Path, tmp_path: Path) -> None:
    fewer = scored_folder(tmp_path / "fewer", 0.5, prompts=12)
    with pytest.raises(UserError, match="24 only in base, 0 only in fewer"):
        write_report(root / "base", [fewer], tmp_path / "r.html")
    other = Path(shutil.copytree(root / "dpo", tmp_path / "other"))
    about = json.loads((other / "scores.json").read_text())
    about["evaluators"]["oracle"]["version"] = "0"
    (other / "scores.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"evaluators.oracle.version: 1 -> 0"):
        write_report(root / "base", [other], tmp_path / "r.html")


def test_unusable_folders_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        write_report(root / "base", [tmp_path / "nothing"], tmp_path / "r.html")
    with pytest.raises(UserError, match="given twice"):
        write_report(root / "base", [root / "base"], tmp_path / "r.html")
    bare = Path(shutil.copytree(root / "dpo", tmp_path / "bare"))
    (bare / "scores.parquet").unlink()
    with pytest.raises(UserError, match=r"not scored(.|\n)*diffpref score"):
        write_report(root / "base", [bare], tmp_path / "r.html")
    with pytest.raises(UserError, match=r"end in \.html"):
        write_report(root / "base", [root / "dpo"], tmp_path / "r")


@pytest.mark.parametrize("name", ["scores", "manifest"])
def test_a_report_inside_a_folder_leaves_its_scores_and_settings(
    root: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(root / "dpo", tmp_path / "dpo"))
    before = (folder / f"{name}.json").read_bytes()
    with pytest.raises(UserError, match=rf"would overwrite .*{name}\.json"):
        write_report(root / "base", [folder], folder / f"{name}.html")
    assert (folder / f"{name}.json").read_bytes() == before


def test_an_image_changed_after_scoring_is_named(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "dpo", tmp_path / "touched"))
    Image.new("RGB", (64, 64)).save(folder / "images" / "00002-s1.png")
    with pytest.raises(UserError, match=r"00002-s1.png is not the image that was scored"):
        write_report(root / "base", [folder], tmp_path / "r.html")


def test_any_numeric_column_of_any_evaluator_is_compared(root: Path, tmp_path: Path) -> None:
    folders = []
    for position, name in enumerate(("base", "dpo")):
        folder = Path(shutil.copytree(root / name, tmp_path / name))
        table = pq.read_table(folder / "scores.parquet")
        kept = table.select([c for c in table.column_names if not c.startswith("oracle")])
        values = pa.array(np.arange(48) * 0.5 - position, pa.float32())
        pq.write_table(kept.append_column("aesthetic", values), folder / "scores.parquet")
        about = {
            "version": "2",
            "scale": "lower is better here",
            "higher_is_better": False,
            "fingerprint": "f",
        }
        (folder / "scores.json").write_text(json.dumps({"evaluators": {"aesthetic": about}}))
        folders.append(folder)
    report = write_report(folders[0], [folders[1]], tmp_path / "r.html")
    cell = report["results"]["dpo"]["aesthetic"]
    assert cell["difference"] == pytest.approx(-1.0)  # the value fell, and falling is better
    assert (cell["wins"], cell["win_rate"], cell["verdict"]) == (24, 1.0, "better")
    assert "aesthetic" in (tmp_path / "r.html").read_text()


def test_candidates_in_folders_of_one_name_are_told_apart_by_their_parents(
    root: Path, tmp_path: Path
) -> None:
    for name in ("base", "dpo"):
        shutil.copytree(root / name, tmp_path / name / "images-out")
    report = write_report(
        tmp_path / "base" / "images-out", [tmp_path / "dpo" / "images-out"], tmp_path / "r.html"
    )
    assert report["candidates"] == ["dpo"]


def test_candidates_whose_folders_and_parents_are_called_the_same_stay_two_models(
    root: Path, tmp_path: Path
) -> None:
    for name in ("base", "dpo", "sft"):
        shutil.copytree(root / name, tmp_path / name / "seed0" / "eval" / "images")
    folders = [tmp_path / name / "seed0" / "eval" / "images" for name in ("base", "dpo", "sft")]
    found = load_folders(folders[0], folders[1:])
    assert [folder.name for folder in found] == [f"{n}/seed0/eval/images" for n in ("base", "dpo", "sft")]


def test_the_grid_keeps_to_its_budget_and_shows_the_wanted_prompts_first(root: Path) -> None:
    folders = load_folders(root / "base", [root / "dpo"])
    assert [row.id for row in build_grid(folders, "oracle", first=[20, 7], budget=1).rows] == ["00020-s0"]
    grid = build_grid(folders, "oracle", first=[20, 7], budget=1_000_000)
    one = sum(len(cell.source) for cell in grid.rows[0].cells)
    assert (len(grid.rows), grid.total) == (48, 48)
    some = build_grid(folders, "oracle", first=[20, 7], budget=12 * one).rows
    assert {"00007-s0", "00020-s0", "00007-s1", "00020-s1"} <= {row.id for row in some}
    assert len(some) < 24
    others = [row.prompt_id for row in some if row.prompt_id not in (7, 20)]
    assert len(others) >= 2
    assert max(others) - min(others) >= 6  # spread over the suite, not its beginning


def test_pictures_are_lossless_when_small_and_shrunk_when_large() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert (np.asarray(decoded(embed(noise))) == np.asarray(noise)).all()
    assert decoded(embed(Image.new("RGB", (1024, 512), "red"))).size == (320, 160)


def decoded(uri: str) -> Image.Image:
    import base64
    import io

    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")


ODD_SCORES = {
    "a list": "[]", "no object": "3", "nested": "[" * 100_000, "evaluators a list": '{"evaluators": []}',
    "an evaluator that is a text": '{"evaluators": {"oracle": "x"}}',
    "columns a list": '{"evaluators": {"oracle": {"version": "1", "fingerprint": "a", "columns": []}}}',
    "no version": '{"evaluators": {"oracle": {"fingerprint": "a"}}}',
}  # fmt: skip


@pytest.mark.parametrize("text", ODD_SCORES.values(), ids=ODD_SCORES)
def test_odd_descriptions_of_scores_are_one_error(root: Path, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(root / "dpo", tmp_path / "dpo"))
    (folder / "scores.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        write_report(root / "base", [folder], tmp_path / "r.html")


@pytest.mark.parametrize("text", ["[]", '"x"', "[" * 100_000, '{"suite": 3}'])
def test_odd_manifests_are_one_error(root: Path, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(root / "dpo", tmp_path / "dpo"))
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        write_report(root / "base", [folder], tmp_path / "r.html")


@pytest.mark.parametrize("column", ["id", "prompt_id", "prompt", "kind", "oracle"])
def test_odd_values_in_the_table_of_scores_are_one_error(root: Path, tmp_path: Path, column: str) -> None:
    folder = Path(shutil.copytree(root / "dpo", tmp_path / "dpo"))
    table = pq.read_table(folder / "scores.parquet")
    odd = pa.array([["x"]] * len(table))
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, odd), folder / "scores.parquet")
    with pytest.raises(UserError, match="score"):
        write_report(root / "base", [folder], tmp_path / "r.html")


def test_a_newer_description_of_scores_can_be_read(root: Path, tmp_path: Path) -> None:
    """Keys that this version does not know are left alone, in evaluators and in columns."""
    paths = []
    for name in ("base", "dpo"):
        folder = Path(shutil.copytree(root / name, tmp_path / name))
        described = json.loads((folder / "scores.json").read_text())
        described["format"] = 99
        for about in described["evaluators"].values():
            about["calibration"] = {"scale": [1, 2]}
            for column in about["columns"].values():
                column |= {"unit": "points", "colour": None}
        (folder / "scores.json").write_text(json.dumps(described))
        paths.append(folder)
    newer = write_report(paths[0], [paths[1]], tmp_path / "r.html", resamples=200)
    older = write_report(root / "base", [root / "dpo"], tmp_path / "o.html", resamples=200)
    assert newer["metrics"] == older["metrics"]


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\n", b"3\n", b"[1]\n", b"[" * 100_000 + b"\n", b'{"step": "x", "loss": 1}\n']
)
def test_a_damaged_line_of_the_training_metrics_is_left_out(root: Path, tmp_path: Path, line: bytes) -> None:
    run = tmp_path / "run"
    training_run(run)
    before = _series(run / "metrics.jsonl")
    text = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(line + text + line)
    assert _series(run / "metrics.jsonl") == before
    assert before


def test_names_are_no_markup_in_markdown(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "dpo", tmp_path / "dpo"))
    name = "<img src=x>|`a`[b](http://c)\n# d"
    report = write_report(
        root / "base", [folder], tmp_path / "r.html", names=["base", name], title=f"T {name}",
        markdown=tmp_path / "r.md", resamples=200,
    )  # fmt: skip
    text = (tmp_path / "r.md").read_text()
    assert "<img" not in text
    assert r"\[b\](http" in text  # no link
    assert text.count("[b]") == 0
    assert "\n# d" not in text
    table = markdown_table(report).splitlines()
    bars = {len(re.findall(r"(?<!\\)\|", row)) for row in table}
    assert len(bars) == 1
