"""The report: one self-contained HTML file, and every number of it as JSON beside."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffpref import __version__
from diffpref.errors import UserError
from diffpref.evaluators import stats
from diffpref.paths import atomic_write_text
from diffpref.reporting import tables
from diffpref.reporting.charts import training_charts
from diffpref.reporting.comparison import compare
from diffpref.reporting.loading import ScoredFolder, load_folders
from diffpref.reporting.page import render_page
from diffpref.reporting.pictures import Cell, Grid, GridRow, build_grid


def write_report(
    baseline: str | Path,
    candidates: list[Path],
    out: str | Path,
    title: str = "",
    resamples: int = stats.RESAMPLES,
) -> dict[str, Any]:
    """Compare scored folders and write ``out`` (HTML) and, beside it, the same numbers as ``.json``.

    Args:
        baseline: scored folder of the model to compare with.
        candidates: scored folders of the same suite, precision and evaluators.
        out: path of the HTML file; the JSON has the same name with the ending ``.json``.
        title: heading; by default it names the models.
        resamples: bootstrap resamples, and sign flips of the permutation test.

    Returns:
        The content of the JSON file.

    Raises:
        UserError: folders that are not scored, that cannot be compared (the differences are named), images
            that are missing or changed since they were scored.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out must end in .html, not {out.name!r}", fix=f"--out {out}.html")
    folders = load_folders(Path(baseline), [Path(candidate) for candidate in candidates])
    report = compare(folders, resamples)
    grid = build_grid(folders, report["primary"], _shown_first(report))
    report = {"title": title or _title(folders), **report, **_setup(folders, out)}
    report["headline"] = tables.headline(report)
    page = _render(report, grid, folders)
    try:
        atomic_write_text(out, page)
        atomic_write_text(out.with_suffix(".json"), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {out}", why=str(error.strerror or error)) from error
    return report


def _title(folders: list[ScoredFolder]) -> str:
    names = [folder.name for folder in folders]
    return f"{', '.join(names[1:])} against {names[0]}"


def _shown_first(report: dict[str, Any]) -> list[int]:
    """Prompts that the tables of best and worst point at."""
    return [
        entry["id"]
        for extremes in report["extremes"].values()
        for entries in extremes.values()
        for entry in entries
    ]


def _setup(folders: list[ScoredFolder], out: Path) -> dict[str, Any]:
    """How everything was made."""
    base = folders[0]
    return {
        "suite": base.manifest.get("suite", {}),
        "suite_description": base.manifest.get("suite_description", ""),
        "evaluators": base.evaluators,
        "models": {folder.name: _model(folder, base) for folder in folders},
        "training": {folder.name: _last_values(folder) for folder in folders if folder.training},
        "notes": _notes(folders),
        "commands": _commands(folders, out),
        "versions": {"diffpref": __version__, **base.manifest.get("versions", {})},
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _model(folder: ScoredFolder, base: ScoredFolder) -> dict[str, Any]:
    manifest = folder.manifest
    kept = ("model", "lora", "model_fingerprint", "dtype", "device", "versions")
    return {
        "role": "baseline" if folder is base else "candidate",
        "folder": str(folder.path),
        **{key: manifest.get(key) for key in kept},
        "run": str(folder.training.path) if folder.training else None,
        "config": folder.training.config if folder.training else None,
    }


def _last_values(folder: ScoredFolder) -> dict[str, Any]:
    assert folder.training is not None
    series = folder.training.series
    return {
        "steps": max((steps[-1] for steps, _ in series.values()), default=0),
        "last": {key: values[-1] for key, (_, values) in series.items()},
    }


def _notes(folders: list[ScoredFolder]) -> list[str]:
    """What a careful reader should be told before trusting the numbers."""
    base, notes = folders[0], []
    for folder in folders[1:]:
        if folder.manifest.get("model_fingerprint") == base.manifest.get("model_fingerprint"):
            notes.append(f"{folder.name} has exactly the weights of {base.name}: nothing was trained.")
        differing = [
            f"{key} {value} and {folder.manifest.get('versions', {}).get(key)}"
            for key, value in base.manifest.get("versions", {}).items()
            if folder.manifest.get("versions", {}).get(key) != value
        ]
        if differing:
            notes.append(
                f"{base.name} and {folder.name} were drawn with different versions: {'; '.join(differing)}."
            )
        if folder.manifest.get("device") != base.manifest.get("device"):
            devices = f"{base.manifest.get('device')} and {folder.manifest.get('device')}"
            notes.append(f"{base.name} and {folder.name} were drawn on different devices ({devices}).")
    truncated = base.manifest.get("truncated_prompts", 0)
    if truncated:
        notes.append(f"{truncated} prompts are longer than the text encoder reads: it sees their beginning.")
    if len({row["prompt_id"] for row in base.rows}) < 50:
        notes.append(
            "Fewer than 50 prompts: the intervals are wide, and the bootstrap's are a little too narrow."
        )
    return notes


def _commands(folders: list[ScoredFolder], out: Path) -> list[str]:
    commands = [
        ["diffpref", "train", str(folder.training.path / "config.toml")]
        for folder in folders
        if folder.training and folder.training.config
    ]
    for folder in folders:
        manifest = folder.manifest
        lora = ["--lora", str(manifest["lora"])] if manifest.get("lora") else []
        suite = str(manifest.get("suite_source", ""))
        model = ["--model", str(manifest.get("model"))]
        commands.append(["diffpref", "generate", *model, *lora, "--suite", suite, "--out", str(folder.path)])
    judges = ",".join(folders[0].evaluators)
    commands += [["diffpref", "score", str(folder.path), "--evaluators", judges] for folder in folders]
    compared = [part for folder in folders[1:] for part in ("--candidate", str(folder.path))]
    commands.append(["diffpref", "report", "--baseline", str(folders[0].path), *compared, "--out", str(out)])
    return [shlex.join(command) for command in commands]


def _pictured(report: dict[str, Any], grid: Grid) -> dict[tuple[str, str, int], tuple[GridRow, Cell]]:
    """For each extreme prompt of a model the one of its embedded rows (seeds) that shows the effect most."""
    found = {}
    for name, extremes in report["extremes"].items():
        for which, sign in (("best", 1.0), ("worst", -1.0)):
            for entry in extremes[which]:
                pairs = [
                    (row, cell)
                    for row in grid.rows
                    if row.prompt_id == entry["id"]
                    for cell in row.cells
                    if cell.model == name
                ]
                if pairs:
                    found[name, which, entry["id"]] = max(
                        pairs, key=lambda pair: sign * (pair[1].gain or 0.0)
                    )
    return found


def _render(report: dict[str, Any], grid: Grid, folders: list[ScoredFolder]) -> str:
    charts = {folder.name: training_charts(folder.training) for folder in folders if folder.training}
    return render_page(
        "report.html.j2",
        styles=["report.css"],
        script="report.js",
        report=report,
        primary=report["metrics"][report["primary"]],
        grid=grid,
        pictured=_pictured(report, grid),
        sentences={name: tables.sentence(report, name) for name in report["candidates"]},
        charts=charts,
        chart_kinds={chart.title: chart for drawings in charts.values() for chart in drawings}.values(),
    )
