"""The side-by-side grid: which images are shown, small enough to travel inside one HTML file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diffpref.data.images import ImageError, decode_image
from diffpref.errors import UserError
from diffpref.reporting import formatting
from diffpref.reporting.comparison import EPSILON
from diffpref.reporting.loading import ScoredFolder
from diffpref.reporting.thumbnails import PIXEL_ART, embed

BUDGET = 12_000_000  # bytes of embedded images: a file that can still be mailed


@dataclass(frozen=True)
class Cell:
    """One image with what is said under it. ``gain`` is against the baseline's image, None for its own."""

    model: str
    source: str
    alt: str
    score: str
    correct: bool | None
    note: str
    gain: float | None
    outcome: str
    change: str


@dataclass(frozen=True)
class GridRow:
    """The images of one prompt and seed, baseline first."""

    id: str
    prompt_id: int
    prompt: str
    kind: str
    seed: int
    cells: list[Cell] = field(repr=False)


@dataclass(frozen=True)
class Grid:
    """The rows that fit the budget, of ``total``."""

    rows: list[GridRow]
    total: int
    pixelated: bool


def build_grid(folders: list[ScoredFolder], primary: str, first: list[int], budget: int = BUDGET) -> Grid:
    """Rows in the order of the suite. When not all fit, the prompts ``first`` come before the rest.

    Raises:
        UserError: an image is missing, damaged, or no longer the one that was scored.
    """
    base = folders[0]
    wanted = set(first)
    seen: dict[int, int] = {}
    repeats = []
    for scored in base.rows:
        repeats.append(seen.get(scored["prompt_id"], 0))
        seen[scored["prompt_id"]] = repeats[-1] + 1
    order = sorted(
        range(len(base.rows)), key=lambda i: (base.rows[i]["prompt_id"] not in wanted, repeats[i], i)
    )
    chosen: dict[int, GridRow] = {}
    used = 0
    side = 0
    for index in order:
        row, size, side = _row(folders, index, primary)
        if chosen and used + size > budget:
            break
        used += size
        chosen[index] = row
    return Grid([chosen[i] for i in sorted(chosen)], len(base.rows), side <= PIXEL_ART)


def _row(folders: list[ScoredFolder], index: int, primary: str) -> tuple[GridRow, int, int]:
    base = folders[0].rows[index]
    images = [_open(folder.path, folder.rows[index]) for folder in folders]
    cells = [
        _cell(folder, folder.rows[index], base, image, primary)
        for folder, image in zip(folders, images, strict=True)
    ]
    row = GridRow(base["id"], base["prompt_id"], base["prompt"], base["kind"], base["seed"], cells)
    return row, sum(len(cell.source) for cell in cells), max(images[0].size)


def _cell(
    folder: ScoredFolder, row: dict[str, Any], base: dict[str, Any], image: Image.Image, primary: str
) -> Cell:
    column = folder.columns[primary]
    correct = row.get(f"{primary}.all_correct")
    shown = row.get(f"{primary}.caption")
    difference = row[primary] - base[primary]
    gain = None if row is base else difference * (1 if column.higher_is_better else -1)
    outcome = "" if gain is None else "win" if gain > EPSILON else "loss" if gain < -EPSILON else "tie"
    return Cell(
        model=folder.name,
        source=embed(image),
        alt=f"{folder.name}: {row['prompt']}" + (f" (shows: {shown})" if shown else ""),
        score=formatting.number(row[primary], column.share),
        correct=None if correct is None else bool(correct),
        note=str(row.get(f"{primary}.verdict") or ""),
        gain=gain,
        outcome=outcome,
        change="" if gain is None else formatting.change(difference, column.share),
    )


def _open(folder: Path, row: dict[str, Any]) -> Image.Image:
    path = folder / row["file"]
    try:
        data = path.read_bytes()
        image = decode_image(data)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read", why=str(error.strerror), fix="draw it again and score"
        ) from error
    except ImageError as error:
        raise UserError(f"{path} cannot be read", why=error.reason, fix="draw it again and score") from error
    if hashlib.sha256(data).hexdigest() != row["image_sha256"]:
        raise UserError(f"{path} is not the image that was scored", fix=f"diffpref score {folder}")
    return image
