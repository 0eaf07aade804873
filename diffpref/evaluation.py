"""`diffpref evaluate`: a suite drawn by several models, scored and compared, each finished part used
again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffpref.config import ModelConfig
from diffpref.errors import UserError
from diffpref.evaluators import Runtime, stats
from diffpref.generation import MANIFEST, ROWS, generate
from diffpref.paths import home_path
from diffpref.pipelines import check_model, versioned
from diffpref.processes import ALONE, Processes
from diffpref.reporting.report import write_report
from diffpref.scoring import check_names, load_judges, score_with
from diffpref.suites import load_suite

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_PLAIN = ("model", "models", "images")


@dataclass(frozen=True)
class Contestant:
    """A model to draw with, or a folder that was drawn already. label: its name in the report and its
    folder."""

    label: str
    source: str

    @property
    def is_drawn(self) -> bool:
        return is_drawn(Path(self.source).expanduser())


@dataclass(frozen=True)
class Plan:
    """How images are drawn: the arguments of `generation.generate` that all models share."""

    suite: str
    sampling: Mapping[str, Any]
    limit: int
    batch: int
    device: str | None
    dtype: str
    revision: str = ""
    variant: str = ""

    def model(self, source: str) -> ModelConfig:
        """What to load of a contestant. Raises UserError when it is no model."""
        return versioned(source, self.revision, self.variant)


def evaluate(
    contestants: Sequence[Contestant],
    plan: Plan,
    evaluators: list[str],
    out: Path,
    runtime: Runtime | None = None,
    weights: Mapping[str, str] | None = None,
    score_batch: int = 32,
    allow_missing: bool = False,
    force: bool = False,
    title: str = "",
    processes: Processes = ALONE,
) -> dict[str, Any] | None:
    """Draw, score and compare; leaves OUT/LABEL/ for each model, OUT/report.html and OUT/report.json.

    contestants: the baseline first. A folder that `diffpref generate` finished or began is continued,
    scores of the same images are kept, and the report is written anew, so the same command goes on after a
    stop. With a limit the report is of those prompts, whatever else the folders hold. processes: those that
    share drawing and scoring; the main one writes the report. Returns its numbers, None in the others.

    Raises UserError: two of one label, a model or suite that there is not, an evaluator that cannot be loaded
    (before anything is drawn), an OUT with images of other settings.
    """
    _check_labels(contestants)
    suite = load_suite(plan.suite, plan.sampling)
    check_names(evaluators, weights or {})
    for contestant in contestants:
        if not contestant.is_drawn:
            check_model(plan.model(contestant.source))
    if not all(contestant.is_drawn for contestant in contestants):
        # drawing takes hours: weights that cannot be loaded must not show up after it
        load_judges(evaluators, score_batch, runtime, weights or {}, processes)
    folders = []
    for contestant in contestants:
        if contestant.is_drawn:
            folder = home_path(contestant.source)
        else:
            folder = out / contestant.label
            generate(
                plan.model(contestant.source), plan.suite, folder, limit=plan.limit, batch=plan.batch,
                device=plan.device, dtype=plan.dtype, sampling=plan.sampling, processes=processes,
            )  # fmt: skip
        folders.append(folder)
    judges = load_judges(evaluators, score_batch, runtime, weights or {}, processes)
    for folder in folders:
        score_with(folder, judges, score_batch, allow_missing=allow_missing, processes=processes)
    if not processes.main:
        return None
    names = [contestant.label for contestant in contestants]
    prompts = {image.prompt.text for image in suite.images(plan.limit)} if plan.limit else None
    return write_report(
        folders[0], folders[1:], out / "report.html", title=title, force=force, names=names, prompts=prompts
    )


def contestant(text: str) -> Contestant:
    """Of ``LABEL=SOURCE``, or of a source that is labelled by its own name."""
    label, given, source = text.partition("=")
    if given and source and _LABEL.fullmatch(label) and not Path(text).exists():
        return Contestant(label, source)
    return Contestant(label_of(text), text)


def label_of(source: str) -> str:
    """A short name: the run's for RUN/model, the last part for all others."""
    parts = [part for part in re.split(r"[/\\:]", source.rstrip("/")) if part not in ("", ".", "..", "~")]
    names = [part for part in parts if part not in _PLAIN] or parts or ["model"]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", names[-1]).strip("-.") or "model"


def is_drawn(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and (folder / ROWS).is_file()


def describe_precision(numbers: Mapping[str, Any]) -> str:
    """How exact the comparison is, and how many prompts would make it twice as exact."""
    lines = []
    for name in numbers["candidates"]:
        cell = numbers["results"][name][numbers["primary"]]
        low, high = cell["win_rate_interval"] or (0.0, 0.0)  # a single prompt has none
        total = cell["wins"] + cell["ties"] + cell["losses"]
        half = (high - low) / 2
        if half > 0:
            needed = stats.prompts_for_win_rate(half / 2, cell["win_rate"], cell["ties"] / total)
            lines.append(
                f"{name}: win rate {100 * cell['win_rate']:.1f} % within {100 * half:.1f} points over "
                f"{total} prompts; for {50 * half:.1f} points about {needed} prompts are needed"
            )
    return "\n".join(lines)


def _check_labels(contestants: Sequence[Contestant]) -> None:
    seen: dict[str, str] = {}
    for one in contestants:
        if one.label in seen:
            raise UserError(
                f"two models are called {one.label!r}",
                why=f"{seen[one.label]} and {one.source}",
                fix="label them: --candidate NAME=MODEL",
            )
        seen[one.label] = one.source
