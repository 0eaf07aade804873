"""Scores of images: one row per image, one column per evaluator and detail, written as Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from diffpref.errors import UserError
from diffpref.evaluators import EVALUATORS, Evaluator, Runtime, load_evaluators
from diffpref.evaluators.base import Dtype
from diffpref.image_tables import ImageRow, open_images, score_files
from diffpref.processes import ALONE, Processes, choose_device
from diffpref.scoring.judges import Judge
from diffpref.scoring.passes import gather, score_blocks
from diffpref.scoring.tables import ERROR, IDENTITY, read_scores, with_other_evaluators, write_scores
from diffpref.suites import name_hint
from diffpref.texts import one_line

__all__ = [
    "ERROR",
    "IDENTITY",
    "check_missing",
    "check_names",
    "load_judges",
    "name_missing",
    "parts_folder",
    "runtime_of",
    "score",
    "score_with",
]

NAMED = 20


def score(
    place: str | Path,
    evaluators: list[str],
    batch: int = 32,
    runtime: Runtime | None = None,
    weights: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    allow_missing: bool = False,
    processes: Processes = ALONE,
) -> Path:
    """Score every image of a folder or table with every evaluator, in one pass over the images.

    Writes ``scores.parquet`` (columns ``id, prompt_id, prompt, kind, seed, file, image_sha256``, then
    ``<evaluator>`` float32 and ``<evaluator>.<detail>``) and ``scores.json`` (what each column means).
    Finished blocks wait in a hidden folder, so a stopped run goes on where it was and gives the same bytes;
    scores that these or other evaluators gave to the very same images earlier are kept.

    Args:
        batch: images judged together.
        runtime: device and dtype of all evaluators; by default the best device, fp32.
        weights: folder, file or hub id by the name of an evaluator, where not the published ones.
        columns: names of columns by key of ``image_tables.COLUMNS``.
        allow_missing: keep images that are missing or damaged as rows without scores, with the reason in the
            column ``error``; otherwise they are an error once all others are scored.
        processes: those that share the work; the main one writes the result.

    Raises:
        UserError: unknown evaluator, no images, images that are missing or damaged (all are counted, the
            first ones named), a prompt that an evaluator cannot read. No table is written then.
    """
    if batch < 1:
        raise UserError("--batch must be at least 1", why=f"it is {batch}")
    judges = load_judges(evaluators, batch, runtime, weights or {}, processes)
    return score_with(place, judges, batch, columns, allow_missing, processes)


def score_with(
    place: str | Path,
    judges: list[Judge],
    batch: int,
    columns: Mapping[str, str] | None = None,
    allow_missing: bool = False,
    processes: Processes = ALONE,
) -> Path:
    """`score` with evaluators that are loaded already."""
    place = Path(place)
    images = open_images(place, columns, any(judge.evaluator.needs_prompt for judge in judges))
    parquet, info = score_files(place)
    folder = parts_folder(parquet)
    earlier = read_scores(parquet, info)
    try:
        score_blocks(images, judges, folder, earlier, batch, processes, f"score {one_line(place.name)}")
        processes.wait()
        if processes.main:
            table = gather(images, judges, folder, batch)
            check_missing(images, table, allow_missing)
            # read again: another evaluator's scores may have been written meanwhile
            table, about = with_other_evaluators(table, judges, read_scores(parquet, info))
            write_scores(parquet, info, table, about)
            for judge in judges:
                judge.remove_parts(folder)
    except OSError as error:
        raise UserError(f"cannot write the scores of {place}", why=str(error.strerror or error)) from error
    return parquet


def runtime_of(device: str | None, dtype: Dtype, processes: Processes = ALONE) -> Runtime:
    """Where evaluators run. Raises UserError when the device cannot be used."""
    return Runtime(device=choose_device(device, processes.local_rank), dtype=dtype)


def load_judges(
    names: list[str],
    batch: int,
    runtime: Runtime | None,
    weights: Mapping[str, str],
    processes: Processes = ALONE,
) -> list[Judge]:
    """The evaluators of these names with their runtimes. Raises UserError for weights of another one."""
    check_names(names, weights)
    runtime = runtime or runtime_of(None, "fp32", processes)
    runtimes = {name: replace(runtime, batch=batch, weights=weights.get(name, "")) for name in names}
    found: list[Evaluator] = load_evaluators(names, runtimes)
    return [Judge(evaluator, runtimes[evaluator.name], batch) for evaluator in found]


def check_names(names: list[str], weights: Mapping[str, str]) -> None:
    """Raise UserError for an evaluator that there is not, and for weights of one that is not asked for."""
    for name in names:
        if name not in EVALUATORS:
            raise UserError(f"there is no evaluator named {name!r}", fix=name_hint(name, EVALUATORS))
    for name in weights:
        if name not in names:
            raise UserError(
                f"--weights names {name!r}, which is not among the evaluators",
                why=f"--evaluators {','.join(names)}",
            )


def parts_folder(parquet: Path) -> Path:
    """Where finished blocks of a table wait: `.scores` in a folder, `.NAME.scores` beside a file."""
    return parquet.with_name(f".{parquet.stem}")


def check_missing(images: Sequence[ImageRow], table: pa.Table, allowed: bool) -> None:
    """Raise UserError naming the images without scores, unless they are allowed and others have scores."""
    missing = [(index, error) for index, error in enumerate(table[ERROR].to_pylist()) if error is not None]
    if not missing or (allowed and len(missing) < len(table)):
        return
    lines = [f"{images[index].where}: {error}" for index, error in missing]
    raise name_missing(lines, len(missing), len(table), "images", len(missing) < len(table))


def name_missing(lines: Sequence[str], count: int, total: int, noun: str, some_left: bool) -> UserError:
    """The error that names what cannot be scored: the first lines, and how many there are."""
    shown = list(lines[:NAMED]) + ([f"and {count - NAMED} more"] if count > NAMED else [])
    again = "run the same command again: what is scored stays"
    return UserError(
        f"{count} of {total} {noun} cannot be scored",
        why="\n       ".join(shown),
        fix=f"draw or copy them again and {again}; or --allow-missing" if some_left else "draw them again",
    )
