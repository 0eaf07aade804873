"""The sample sheet: pairs with their images and captions, the differences marked, small enough for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffpref.captions.survey import EQUAL, Row
from diffpref.captions.wording import Piece, difference
from diffpref.data.images import ImageError, decode_image
from diffpref.data.pairs import image_bytes
from diffpref.data.reader import RowReader
from diffpref.data.schema import Columns, PairFile
from diffpref.reporting.thumbnails import PIXEL_ART, embed

THUMBNAIL, QUALITY = 256, 78
BUDGET = 5_000_000
"""Characters of embedded images; the page around them stays below a megabyte."""
SHOWN = 12_000
"""Characters of a caption that the sheet shows."""


@dataclass(frozen=True)
class Side:
    """An image of a pair with its caption.

    pieces: the caption, words marked that the other image's lacks; left_out: characters not shown. before:
    what the perturber was given, where that is stored, words marked that it changed. source: data URI, ""
    with a problem.
    """

    image: int
    role: str
    source: str
    problem: str
    small: bool
    pieces: list[Piece] = field(repr=False)
    left_out: int
    tokens: int | None
    cut: bool
    origin: str
    before: list[Piece]


@dataclass(frozen=True)
class SheetRow:
    """A pair, the winner first; `sides` in the order of the images without a preference."""

    row: Row
    file: str
    file_row: int
    sides: tuple[Side, Side]


def build_sheet(
    rows: Sequence[Row], files: Sequence[PairFile], columns: Columns, limit: int, budget: int = BUDGET
) -> list[SheetRow]:
    """The rows, as many of them as the budget of embedded characters allows."""
    reader = RowReader(files)
    sheet: list[SheetRow] = []
    used = 0
    for row in rows:
        cells = reader.read(row.number, (columns.image_0, columns.image_1))
        built = _row(row, cells, files, reader, columns, limit)
        used += sum(len(side.source) for side in built.sides)
        if sheet and used > budget:
            break
        sheet.append(built)
    return sheet


def _row(
    row: Row,
    cells: dict[str, Any],
    files: Sequence[PairFile],
    reader: RowReader,
    columns: Columns,
    limit: int,
) -> SheetRow:
    marked = difference(*(caption[:SHOWN] for caption in row.captions))
    images = (cells[columns.image_0], cells[columns.image_1])
    sides = [_side(row, side, images[side], marked[side], limit) for side in (0, 1)]
    file, file_row = reader.locate(row.number)
    first = row.winner or 0
    return SheetRow(row, files[file].path.name, file_row, (sides[first], sides[1 - first]))


def _side(row: Row, side: int, image: Any, pieces: list[Piece], limit: int) -> Side:
    origin = row.origins[side] or {}
    before = origin.get("before") or ""
    source, problem, small = _thumbnail(image)
    tokens = row.tokens[side]
    return Side(
        image=side,
        role=row.role(side),
        source=source,
        problem=problem,
        small=small,
        pieces=[Piece(piece.text, False) for piece in pieces] if EQUAL in row.flags else pieces,
        left_out=max(0, len(row.captions[side]) - SHOWN),
        tokens=tokens,
        cut=tokens is not None and tokens > limit,
        origin=describe_origin(origin),
        before=difference(before[:SHOWN], row.captions[side][:SHOWN])[0],
    )


def _thumbnail(image: Any) -> tuple[str, str, bool]:
    try:
        picture = decode_image(image_bytes(image))
    except ImageError as error:
        return "", error.reason, False
    return embed(picture, THUMBNAIL, QUALITY), "", max(picture.size) <= PIXEL_ART


def describe_origin(origin: dict[str, Any]) -> str:
    """Who wrote a caption, in a few words; "" where that is not stored."""
    captioner, perturber = origin.get("captioner"), origin.get("perturber")
    said = [_maker(captioner)] if captioner else []
    if perturber:
        level = perturber.get("level")
        text = _maker(perturber) + (f", {level}" if level else "")
        said.append(text if origin.get("changed") is not False else f"{text} (left unchanged)")
    return ", then ".join(said) or str(origin.get("source") or "")


def _maker(maker: dict[str, Any]) -> str:
    return " ".join(str(maker[key]) for key in ("backend", "model") if maker.get(key))
