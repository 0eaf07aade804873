"""`diffpref demo`: the whole path on the small model that ships with the package, from pairs to a report."""

from __future__ import annotations

import time
from pathlib import Path

from diffpref.config import TrainConfig, load_train_config
from diffpref.errors import UserError, nearest
from diffpref.generation import generate
from diffpref.paths import share_dir
from diffpref.reporting.report import write_report
from diffpref.reporting.tables import markdown_table
from diffpref.scoring import score
from diffpref.training.run import train

BASE = "tiny:model"
SUITE = "tiny-demo"
OBJECTIVES = ("sft", "dpo", "mapo", "dcpo")
"""Recipes of the demo, `configs/train/demo-NAME.toml`; dcpo is dpo with a caption for each image."""
BATCH = 40


def run_demo(out: Path, objectives: list[str]) -> Path:
    """Aligns the small model with each objective, judges held-out prompts, writes `out/report.html`.

    objectives: names from OBJECTIVES; empty for all. Finished parts in `out` are used as they are, so the
    same command continues a stopped demo. Returns the path of the report.

    Raises UserError for an unknown objective, or an `out` that holds another version's demo.
    """
    started = time.monotonic()
    chosen = _chosen(objectives)
    parts = 1 + len(chosen)
    _say(f"1/{parts} base: {SUITE} prompts drawn by the small model as it ships")
    baseline = _evaluate(BASE, out / "base")
    candidates = []
    for number, name in enumerate(chosen, start=2):
        config = _config(name, out)
        _say(
            f"{number}/{parts} {name}: {config.train.steps} steps of {config.train.batch_size} pairs, "
            f"objective {config.objective.name}, {config.data.captions} captions"
        )
        run = train(config)
        candidates.append(_evaluate(str(run / "model"), out / name / name))
    report = out / "report.html"
    numbers = write_report(baseline, candidates, report, title="diffpref demo: the small model, aligned")
    print(f"\n{markdown_table(numbers)}\n\n{numbers['headline']}")
    print(f"{time.monotonic() - started:.0f} s; open {report.resolve()}", flush=True)
    return report


def _chosen(objectives: list[str]) -> list[str]:
    for name in objectives:
        if name not in OBJECTIVES:
            close = nearest(name, OBJECTIVES)
            raise UserError(
                f"the demo has no objective {name!r}",
                why=f"it has {', '.join(OBJECTIVES)}",
                fix=f"did you mean {close!r}?" if close else "",
            )
    return list(dict.fromkeys(objectives)) or list(OBJECTIVES)


def _config(name: str, out: Path) -> TrainConfig:
    recipe = share_dir("configs") / "train" / f"demo-{name}.toml"
    places = [("output", str(out / name / "run")), ("data.cache_dir", str(out / "cache"))]
    return load_train_config(recipe, places)


def _evaluate(model: str, folder: Path) -> Path:
    generate(model, SUITE, folder, batch=BATCH)
    score(folder, ["oracle"])
    return folder


def _say(message: str) -> None:
    print(f"\n== {message}", flush=True)
