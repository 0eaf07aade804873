"""The report: one self-contained HTML file, every number of it as JSON beside, tables on request."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from diffpref.errors import UserError
from diffpref.evaluators import stats
from diffpref.generation import MANIFEST
from diffpref.image_tables import score_files
from diffpref.paths import atomic_write_text
from diffpref.reporting import tables
from diffpref.reporting.charts import training_charts
from diffpref.reporting.comparison import compare
from diffpref.reporting.distributions import gain_histogram, score_histogram, series_style
from diffpref.reporting.latex import latex_table
from diffpref.reporting.loading import ScoredFolder, load_folders
from diffpref.reporting.page import render_page
from diffpref.reporting.pictures import BUDGET, Cell, Grid, GridRow, build_grid
from diffpref.reporting.provenance import notes, setup
from diffpref.reporting.published import published_tables


def write_report(
    baseline: str | Path,
    candidates: list[Path],
    out: str | Path,
    title: str = "",
    resamples: int = stats.RESAMPLES,
    latex: Path | None = None,
    markdown: Path | None = None,
    image_megabytes: float = BUDGET / 1e6,
    force: bool = False,
    names: Sequence[str] = (),
    prompts: Collection[str] | None = None,
) -> dict[str, Any]:
    """Compare scored folders and write ``out`` (HTML) and, beside it, the same numbers as ``.json``.

    Args:
        baseline: scored folder of the model to compare with.
        candidates: scored folders of the same suite, precision and evaluators.
        out: path of the HTML file; the JSON has the same name with the ending ``.json``.
        title: heading; by default it names the models.
        resamples: bootstrap resamples, and sign flips of the permutation test.
        latex: path for the main table in LaTeX.
        markdown: path for all tables in Markdown.
        image_megabytes: size that embedded images may come to; see ``build_grid`` for which are kept.
        force: compare folders whose sampling settings differ, and say how they differ.
        names: of the models, the baseline first, distinct; by default those of their folders.
        prompts: texts of the prompts to compare over; None for all that the folders share.

    Returns:
        The content of the JSON file.

    Raises:
        UserError: folders that are not scored, that cannot be compared (the differences are named), images
            that are missing or changed since they were scored, paths that cannot be written.
    """
    out = Path(out)
    _check_paths(out, latex, markdown, image_megabytes)
    _spare_inputs(out, [Path(baseline), *map(Path, candidates)])
    paths = [Path(candidate) for candidate in candidates]
    folders = load_folders(Path(baseline), paths, force, names, prompts)
    report = compare(folders, resamples)
    about = report["metrics"][report["primary"]]
    grid = build_grid(
        folders, report["primary"], _shown_first(report), int(image_megabytes * 1e6), about["decimals"]
    )
    report = {"title": title or _title(folders), **report, **setup(folders, out)}
    report["setting_differences"] = [f"{f.name}: {line}" for f in folders for line in f.differences]
    report["notes"] = notes(folders, report["missing"])
    report["published"] = published_tables(report)
    report["images_embedded"] = {"rows": len(grid.rows), "of": grid.total}
    report["headline"] = tables.headline(report)
    texts = {out: _render(report, grid, folders)}
    if latex:
        texts[latex] = latex_table(report)
    if markdown:
        texts[markdown] = tables.markdown_report(report)
    texts[out.with_suffix(".json")] = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    for path, text in texts.items():
        try:
            atomic_write_text(path, text)
        except OSError as error:
            raise UserError(f"cannot write {path}", why=str(error.strerror or error)) from error
    return report


def _check_paths(out: Path, latex: Path | None, markdown: Path | None, image_megabytes: float) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out must end in .html, not {out.name!r}", fix=f"--out {out}.html")
    for option, path, ending in (("--latex", latex, ".tex"), ("--markdown", markdown, ".md")):
        if path and path.suffix.lower() != ending:
            raise UserError(
                f"{option} must end in {ending}, not {path.name!r}", fix=f"{option} {path}{ending}"
            )
    if not image_megabytes > 0:
        raise UserError("--image-megabytes must be above 0", why=f"it is {image_megabytes:g}")


def _spare_inputs(out: Path, folders: list[Path]) -> None:
    numbers = out.with_suffix(".json")
    if numbers.resolve() in [
        path.resolve() for folder in folders for path in (folder / MANIFEST, score_files(folder)[1])
    ]:
        raise UserError(
            f"--out {out} would overwrite {numbers}",
            why="the numbers of the report go to the .json of the same name",
            fix=f"--out {out.with_name('report.html')}",
        )


def _title(folders: list[ScoredFolder]) -> str:
    names = [folder.name for folder in folders]
    return f"{', '.join(names[1:])} against {names[0]}"


def _shown_first(report: dict[str, Any]) -> list[int]:
    """Prompts that the lists of best and worst point at, those of the primary metric in front."""
    metrics = sorted(report["extremes"], key=lambda metric: metric != report["primary"])
    return [
        entry["id"]
        for metric in metrics
        for extremes in report["extremes"][metric].values()
        for entries in extremes.values()
        for entry in entries
    ]


def _pictured(report: dict[str, Any], grid: Grid) -> dict[tuple[str, str, str, int], tuple[GridRow, Cell]]:
    """For each extreme prompt of a metric and model the embedded row (seed) that shows the effect most."""
    by_prompt: dict[int, list[GridRow]] = {}
    for row in grid.rows:
        by_prompt.setdefault(row.prompt_id, []).append(row)
    names = list(report["results"])
    found = {}
    for column, metric in enumerate(report["metrics"]):
        direction = 1.0 if report["metrics"][metric]["higher_is_better"] else -1.0
        for name, extremes in report["extremes"][metric].items():
            model = names.index(name)
            for which, sign in (("best", direction), ("worst", -direction)):
                for entry in extremes[which]:
                    rows = [
                        (sign * (score - base), row)
                        for row in by_prompt.get(entry["id"], [])
                        if (score := row.scores[model][column]) is not None
                        and (base := row.scores[0][column]) is not None
                    ]
                    if rows:
                        row = max(rows, key=lambda found: found[0])[-1]
                        found[metric, name, which, entry["id"]] = (row, row.cells[model])
    return found


def _grid_data(report: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """What the page's script needs to filter, sort and label images: scores by row, model and metric."""
    keys = ("label", "share", "decimals", "higher_is_better")
    return {
        "models": list(report["results"]),
        "metrics": [{key: about[key] for key in keys} for about in report["metrics"].values()],
        "primary": list(report["metrics"]).index(report["primary"]),
        "epsilon": report["epsilon"],
        "scores": {row.anchor: row.scores for row in grid.rows},
    }


def _render(report: dict[str, Any], grid: Grid, folders: list[ScoredFolder]) -> str:
    charts = {folder.name: training_charts(folder.training) for folder in folders if folder.training}
    return render_page(
        "report.html.j2",
        styles=["report.css"],
        scripts=["grid.js", "lightbox.js", "tables.js"],
        report=report,
        primary=report["metrics"][report["primary"]],
        grid=grid,
        grid_data=_grid_data(report, grid),
        pictured=_pictured(report, grid),
        sentences={name: tables.sentence(report, name) for name in report["candidates"]},
        charts=charts,
        chart_kinds={chart.title: chart for drawings in charts.values() for chart in drawings}.values(),
        score_histogram=score_histogram,
        gain_histogram=gain_histogram,
        series_style=series_style,
        prompts_for_win_rate=stats.prompts_for_win_rate,
        wins=tables.WINS,
    )
