"""The side-by-side grid: which images are shown, small enough to travel inside one HTML file."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diffpref.data.images import ImageError, decode_image
from diffpref.errors import UserError
from diffpref.files import read_file
from diffpref.reporting import formatting
from diffpref.reporting.comparison import EPSILON
from diffpref.reporting.loading import ScoredFolder
from diffpref.reporting.thumbnails import PIXEL_ART, embed
from diffpref.scoring import ERROR

BUDGET = 12_000_000  # bytes of embedded images: a file that can still be mailed


@dataclass(frozen=True)
class Cell:
    """One image with what is said under it.

    ``gain`` in the primary metric is against the baseline's image, None for its own. ``source`` is empty for
    an image that is missing; ``note`` says then why.
    """

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
    """The images of one prompt and seed, baseline first; ``scores`` by model, then metric."""

    id: str
    prompt_id: int
    prompt: str
    kind: str
    seed: int
    cells: list[Cell] = field(repr=False)
    scores: list[list[float | None]] = field(repr=False)

    @property
    def anchor(self) -> str:
        """The id with all but letters, digits, dot and dash as their numbers: pages link to it as it is."""
        return re.sub(r"[^A-Za-z0-9.-]", lambda odd: f"_{ord(odd[0]):x}_", self.id)


@dataclass(frozen=True)
class Grid:
    """The rows that fit the budget, of ``total``."""

    rows: list[GridRow]
    total: int
    pixelated: bool


def build_grid(
    folders: list[ScoredFolder],
    primary: str,
    first: list[int],
    budget: int = BUDGET,
    decimals: int | None = None,
) -> Grid:
    """Rows in the order of the suite, with scores of the metric ``primary`` written with ``decimals``.

    When not all fit ``budget`` bytes, embedded are, in this order and first seeds before later ones: the
    prompts ``first``, then prompts spread evenly over the suite.

    Raises:
        UserError: an image is missing though it was scored, damaged, or no longer the one that was scored.
    """
    chosen: dict[int, GridRow] = {}
    used = 0
    side = 0
    for index in _order(folders[0].rows, first):
        row, size, largest = _row(folders, index, primary, decimals)
        if chosen and used + size > budget:
            break
        used += size
        side = max(side, largest)
        chosen[index] = row
    return Grid([chosen[i] for i in sorted(chosen)], len(folders[0].rows), side <= PIXEL_ART)


def _order(rows: list[dict[str, Any]], first: list[int]) -> list[int]:
    """Row numbers, the ones to embed first in front."""
    ranks = {prompt: rank for rank, prompt in enumerate(dict.fromkeys(first))}
    prompts = list(dict.fromkeys(row["prompt_id"] for row in rows))
    spread = {prompt: len(ranks) + _reversed_bits(position) for position, prompt in enumerate(prompts)}
    seen: dict[int, int] = {}
    keys = []
    for index, row in enumerate(rows):
        prompt = row["prompt_id"]
        repeat = seen[prompt] = seen.get(prompt, -1) + 1
        keys.append((prompt not in ranks, repeat, ranks.get(prompt, spread[prompt]), index))
    return [key[-1] for key in sorted(keys)]


def _reversed_bits(number: int) -> int:
    """Sorting 0, 1, 2, ... by this spreads any first part of them evenly (van der Corput's sequence)."""
    return int(f"{number:032b}"[::-1], 2)


def _row(
    folders: list[ScoredFolder], index: int, primary: str, decimals: int | None
) -> tuple[GridRow, int, int]:
    """The row, its size in bytes, and the longest side of its images."""
    base = folders[0].rows[index]
    rows = [folder.rows[index] for folder in folders]
    images = [
        None if row.get(ERROR) else _open(folder.path, row) for folder, row in zip(folders, rows, strict=True)
    ]
    cells = [
        _cell(folder, row, base, image, primary, decimals)
        for folder, row, image in zip(folders, rows, images, strict=True)
    ]
    metrics = folders[0].metrics
    scores = [[row[metric] for metric in metrics] for row in rows]
    made = GridRow(base["id"], base["prompt_id"], base["prompt"], base["kind"], base["seed"], cells, scores)
    sides = [max(image.size) for image in images if image is not None]
    return made, sum(len(cell.source) for cell in cells), max(sides, default=0)


def _cell(
    folder: ScoredFolder,
    row: dict[str, Any],
    base: dict[str, Any],
    image: Image.Image | None,
    primary: str,
    decimals: int | None,
) -> Cell:
    score = row[primary]
    if image is None or score is None:
        reason = f"no scores: {row.get(ERROR) or 'not scored'}"
        source = embed(image) if image is not None else ""
        return Cell(folder.name, source, f"{folder.name}: {row['prompt']}", "", None, reason, None, "", "")
    column = folder.columns[primary]
    correct = row.get(f"{primary}.all_correct")
    shown = row.get(f"{primary}.caption")
    difference = None if row is base or base[primary] is None else score - base[primary]
    gain = None if difference is None else difference * (1 if column.higher_is_better else -1)
    outcome = "" if gain is None else "win" if gain > EPSILON else "loss" if gain < -EPSILON else "tie"
    return Cell(
        model=folder.name,
        source=embed(image),
        alt=f"{folder.name}: {row['prompt']}" + (f" (shows: {shown})" if shown else ""),
        score=formatting.number(score, column.share, decimals),
        correct=None if correct is None else bool(correct),
        note=str(row.get(f"{primary}.verdict") or ""),
        gain=gain,
        outcome=outcome,
        change="" if difference is None else formatting.change(difference, column.share, decimals),
    )


def _open(folder: Path, row: dict[str, Any]) -> Image.Image:
    path = folder / row["file"]
    try:
        data = read_file(path)
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
