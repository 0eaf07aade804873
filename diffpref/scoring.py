"""Scores of images: one row per image, one column per evaluator and detail, written as Parquet."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from diffpref.data.images import ImageError, decode_image
from diffpref.errors import UserError
from diffpref.evaluators import DetailedEvaluator, Evaluator, load_evaluators
from diffpref.image_tables import ImageRow, read_images, score_files
from diffpref.paths import atomic_write_bytes, atomic_write_text

IDENTITY = ("id", "prompt_id", "prompt", "kind", "seed", "file", "image_sha256")


def score(folder: str | Path, evaluators: list[str], batch: int = 32) -> Path:
    """Score every image of a folder or table with every evaluator.

    Writes ``scores.parquet`` (columns ``id, prompt_id, prompt, kind, seed, file, image_sha256``, then
    ``<evaluator>`` float32 and ``<evaluator>.<detail>``) and ``scores.json`` (what each column means). Scores
    that another evaluator gave to the very same images are kept.

    Raises:
        UserError: unknown evaluator, no images, an image that is missing or damaged, a prompt that an
            evaluator cannot read. Nothing is written then.
    """
    if batch < 1:
        raise UserError("--batch must be at least 1", why=f"it is {batch}")
    place = Path(folder)
    judges = load_evaluators(evaluators)
    rows = read_images(place)
    hashes: list[str] = []
    parts: dict[str, list[Any]] = {}
    with tqdm(total=len(rows), unit="image", desc=f"score {place.name}") as progress:
        for group in _batches(rows, batch):
            loaded = [_load(row) for row in group]
            hashes += [digest for _, digest in loaded]
            images, prompts = [image for image, _ in loaded], [row.prompt for row in group]
            for judge in judges:
                for name, values in _evaluate(judge, images, prompts, group).items():
                    parts.setdefault(name, []).extend(values)
            progress.update(len(group))
    table = _table(rows, hashes, parts)
    about = {judge.name: describe(judge) for judge in judges}
    return _write(place, table, about)


def describe(judge: Evaluator) -> dict[str, Any]:
    """What must be known about an evaluator to read, and to compare, its scores."""
    return {
        "version": judge.version,
        "fingerprint": judge.fingerprint,
        "scale": judge.scale,
        "higher_is_better": judge.higher_is_better,
        "needs_prompt": judge.needs_prompt,
        "columns": {name: asdict(column) for name, column in judge.columns().items()},
    }


def _load(row: ImageRow) -> tuple[Image.Image, str]:
    try:
        data = row.read()
        return decode_image(data), hashlib.sha256(data).hexdigest()
    except ImageError as error:
        raise UserError(
            f"{row.where} cannot be scored", why=error.reason, fix="draw or copy it again"
        ) from error
    except OSError as error:
        why = "the file is missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise UserError(f"{row.where} cannot be scored", why=why, fix="draw or copy it again") from error


def _evaluate(
    judge: Evaluator, images: list[Image.Image], prompts: list[str], rows: list[ImageRow]
) -> dict[str, Any]:
    details: dict[str, Any] = {}
    if isinstance(judge, DetailedEvaluator):
        scores, details = judge.explain(images, prompts)
    else:
        scores = judge.score(images, prompts)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise UserError(
            f"{judge.name} gives no finite score for {rows[bad[0]].where}", why=f"{scores[bad[0]]}"
        )
    return {judge.name: scores, **{f"{judge.name}.{name}": values for name, values in details.items()}}


def _table(rows: list[ImageRow], hashes: list[str], parts: dict[str, list[Any]]) -> pa.Table:
    columns: dict[str, Any] = {
        "id": [row.id for row in rows],
        "prompt_id": pa.array([row.prompt_id for row in rows], pa.int64()),
        "prompt": [row.prompt for row in rows],
        "kind": [row.kind for row in rows],
        "seed": pa.array([row.seed for row in rows], pa.int64()),
        "file": [row.file for row in rows],
        "image_sha256": hashes,
    }
    for name, values in parts.items():
        columns[name] = values if isinstance(values[0], str) else pa.array(np.asarray(values, np.float32))
    return pa.table(columns)


def _write(place: Path, table: pa.Table, about: dict[str, Any]) -> Path:
    parquet, info = score_files(place)
    table, about = _with_earlier(parquet, info, table, about)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    try:
        # The table last: whoever finds it finds what its columns mean beside it.
        atomic_write_text(info, json.dumps({"images": len(table), "evaluators": about}, indent=2) + "\n")
        atomic_write_bytes(parquet, buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {parquet}", why=str(error.strerror or error)) from error
    return parquet


def _with_earlier(
    parquet: Path, info: Path, table: pa.Table, about: dict[str, Any]
) -> tuple[pa.Table, dict[str, Any]]:
    """Keep the scores of other evaluators if they were given to exactly these images and prompts."""
    try:
        earlier, known = pq.read_table(parquet), json.loads(info.read_text(encoding="utf-8"))["evaluators"]
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return table, about
    same = ("id", "prompt", "image_sha256")
    if not set(same) <= set(earlier.column_names) or not earlier.select(same).equals(table.select(same)):
        return table, about
    for evaluator, description in known.items():
        if evaluator not in about:
            about = {**about, evaluator: description}
            for name in earlier.column_names:
                if name == evaluator or name.startswith(f"{evaluator}."):
                    table = table.append_column(name, earlier[name])
    return table, about


def _batches(rows: list[ImageRow], size: int) -> Iterator[list[ImageRow]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
