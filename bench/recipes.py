"""Trains recipes with varied settings and seeds, judges each result on a suite, and prints one table.

    python bench/recipes.py tiny-sft tiny-dpo tiny-mapo tiny-dcpo --seeds 0 1 2 \
        --suite tiny --against tiny-sft
    python bench/recipes.py tiny-dpo --vary objective.beta=100,500,2000 --vary train.learning_rate=1e-5,5e-5 \
        --set train.steps=100 --suite tiny --limit 160 --out runs/sweep-dpo

Combinations run one after another; the same command continues where it was stopped, past what is finished.
OUT/results.jsonl has a line per finished combination, OUT/table.md the table so far.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from recipe_tables import Finished, tables
from script import printed

from diffpref.config import TrainConfig, load_train_config, to_dict
from diffpref.errors import UserError, nearest
from diffpref.evaluators.stats import average_by_prompt
from diffpref.generation import generate
from diffpref.paths import atomic_write_text, fingerprint
from diffpref.reporting.loading import load_folders
from diffpref.scoring import score
from diffpref.suites import load_suite
from diffpref.training.run import train

RESULTS, TABLE = "results.jsonl", "table.md"


@dataclass(frozen=True)
class Combination:
    """One training run: a recipe, the settings changed in it, and a seed. label: what tables call it, where
    the settings would be too long."""

    recipe: str
    changes: tuple[tuple[str, str], ...]
    seed: int
    label: str = ""

    @property
    def setting(self) -> str:
        """What all seeds of this combination share."""
        return self.label or ", ".join(
            [Path(self.recipe).stem, *(f"{key}={value}" for key, value in self.changes)]
        )

    @property
    def name(self) -> str:
        """Name of its folder."""
        if self.label:
            return f"{self.label}_seed-{self.seed}"
        parts = [
            Path(self.recipe).stem,
            *(f"{key}-{value}" for key, value in self.changes),
            f"seed-{self.seed}",
        ]
        return "_".join(parts).replace("/", "-").replace(":", "-")


@dataclass(frozen=True)
class Judging:
    """How the models are compared: the same prompts, seeds and evaluators for all."""

    suite: str
    limit: int
    batch: int
    evaluators: tuple[str, ...]

    @property
    def folder(self) -> str:
        return f"{Path(self.suite).stem}-{self.limit}" if self.limit else Path(self.suite).stem

    def key(self) -> str:
        """Changes when any score would."""
        return fingerprint([load_suite(self.suite).fingerprint(), self.limit, list(self.evaluators)])

    def run(self, model: str, folder: Path) -> Path:
        generate(model, self.suite, folder, limit=self.limit, batch=self.batch)
        score(folder, list(self.evaluators))
        return folder


def combinations(
    recipes: Sequence[str], fixed: Sequence[str], varied: Sequence[str], seeds: Sequence[int]
) -> list[Combination]:
    """Recipes x all combinations of varied values x seeds. `fixed`: "key=value"; `varied`: "key=a,b,c"."""
    settings = [_assignment(text) for text in fixed]
    axes = [[(key, value) for value in values.split(",")] for key, values in map(_assignment, varied)]
    return [
        Combination(recipe, (*settings, *chosen), seed)
        for recipe in recipes
        for chosen in itertools.product(*axes)
        for seed in seeds
    ]


class Sweep:
    """A folder of combinations, judged alike."""

    def __init__(self, out: Path, judging: Judging, keep_checkpoints: bool = False) -> None:
        self.out, self.judging, self.keep_checkpoints = out, judging, keep_checkpoints

    def run(self, plan: Sequence[Combination], against: str = "") -> str:
        """Run what is missing of `plan` and return the tables; OUT/table.md holds them after each run."""
        configs = [self._config(item) for item in plan]  # a mistake in any of them shows before the first run
        if against and against not in [item.setting for item in plan]:
            close = nearest(against, [item.setting for item in plan])
            raise UserError(
                f"--against: no setting {against!r}", fix=f"did you mean {close!r}?" if close else ""
            )
        bases = sorted({config.model.base for config in configs})
        if len(bases) != 1:
            raise UserError(
                "the recipes start from different models", why=", ".join(bases), fix="one sweep per base"
            )
        finished: list[Finished] = []
        text = ""
        base = self.judging.run(bases[0], self.out / "base" / self.judging.folder)
        for number, (item, config) in enumerate(zip(plan, configs, strict=True), start=1):
            row = self._find(config)
            if row is None:
                print(f"\n== {number}/{len(plan)} {item.setting}, seed {item.seed}", flush=True)
                row = self._measure(item, config)
            finished.append(self._load(item, row, base))
            text = tables(load_folders(base, [self._folder(item)])[0], finished, against)
            atomic_write_text(self.out / TABLE, text + "\n")
        return text

    def _measure(self, item: Combination, config: TrainConfig) -> dict[str, Any]:
        started = time.monotonic()
        run = train(config)
        metrics = _rows(run / "metrics.jsonl")
        if not metrics or metrics[-1]["step"] != config.train.steps or not (run / "model").is_dir():
            sys.exit("stopped; the same command continues")
        folder = self.judging.run(str(run / "model"), self._folder(item))
        row = {
            "name": item.name,
            "recipe": item.recipe,
            "changes": dict(item.changes),
            "seed": item.seed,
            "config": fingerprint(to_dict(config)),
            "judging": self.judging.key(),
            "folder": str(folder.relative_to(self.out)),
            "training_seconds": training_seconds(metrics, config.train.batch_size),
            "wall_seconds": time.monotonic() - started,
            **final_gains(metrics),
        }
        with open(self.out / RESULTS, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        if not self.keep_checkpoints:
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return row

    def _find(self, config: TrainConfig) -> dict[str, Any] | None:
        """The finished row of this very config and judging, if there is one."""
        wanted = fingerprint(to_dict(config)), self.judging.key()
        rows = [row for row in _rows(self.out / RESULTS) if (row["config"], row["judging"]) == wanted]
        return rows[-1] if rows else None

    def _load(self, item: Combination, row: dict[str, Any], base: Path) -> Finished:
        folder = load_folders(base, [self._folder(item)])[1]
        prompts = [line["prompt_id"] for line in folder.rows]
        _, values = average_by_prompt(folder.values(folder.metrics), prompts)
        return Finished(item.setting, item.seed, values, row)

    def _folder(self, item: Combination) -> Path:
        return self.out / item.name / self.judging.folder

    def _config(self, item: Combination) -> TrainConfig:
        changes = [*item.changes, ("seed", str(item.seed)), ("output", str(self.out / item.name / "run"))]
        config = load_train_config(item.recipe, changes)
        if not config.data.cache_dir:
            changes.append(("data.cache_dir", str(self.out / "cache" / _cache_key(config))))
        return load_train_config(item.recipe, changes)


def training_seconds(metrics: Sequence[dict[str, Any]], batch_size: int) -> float:
    """Time spent in optimizer steps, from the logged speeds: right for a resumed run too."""
    seconds, before = 0.0, 0
    for row in metrics:
        if "pairs_per_second" in row:
            seconds += (row["step"] - before) * batch_size / row["pairs_per_second"]
            before = row["step"]
    return seconds


def final_gains(metrics: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Gains over the reference at the end: on held-out pairs, else over the last tenth of training rows."""
    held_out = [row["validation"] for row in metrics if "winner_gain" in row.get("validation", {})]
    trained = [row for row in metrics if "winner_gain" in row]
    rows = held_out[-1:] or trained[-max(1, len(trained) // 10) :]
    keys = ("winner_gain", "loser_gain", "implicit_accuracy")
    return {key: sum(row[key] for row in rows) / len(rows) if rows else None for key in keys}


def _cache_key(config: TrainConfig) -> str:
    """Runs that can share a latent cache have the same key."""
    data = to_dict(config)["data"]
    other = ("captions", "prompt_dropout", "resample_latents", "max_bad_share", "cache_dir", "workers")
    shaping = {key: value for key, value in data.items() if key not in other}
    return fingerprint([to_dict(config)["model"], shaping])[:12]


def _assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise UserError(f"{text!r} is not KEY=VALUE", fix="such as train.steps=100")
    return key.removeprefix("--"), value


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(_parsed(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def _parsed(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # torn by a kill
            continue


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="TOML files or names of shipped recipes")
    parser.add_argument(
        "--vary", action="append", default=[], metavar="KEY=A,B", help="try each value; repeatable"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all; repeatable")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="training seeds (default 0)"
    )
    parser.add_argument("--suite", default="tiny-demo", help="prompts to judge on (default tiny-demo)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the suite's first N prompts")
    parser.add_argument(
        "--batch", type=int, default=40, metavar="N", help="images drawn together (default 40)"
    )
    parser.add_argument("--evaluators", default="oracle", metavar="A,B", help="default oracle")
    parser.add_argument(
        "--against", default="", metavar="SETTING", help="also compare with this one: a recipe's name"
    )
    parser.add_argument("--keep-checkpoints", action="store_true", help="else removed once a model is judged")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="default runs/recipes")
    values = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    judging = Judging(values.suite, values.limit, values.batch, tuple(values.evaluators.split(",")))

    def run() -> str:
        plan = combinations(values.recipes, values.set, values.vary, values.seeds)
        return "\n" + Sweep(values.out, judging, values.keep_checkpoints).run(plan, values.against)

    return printed(run)


if __name__ == "__main__":
    sys.exit(main())
