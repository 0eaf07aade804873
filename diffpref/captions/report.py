"""captions-report.html: what people look at after building dual captions, in one self-contained file."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from diffpref import __version__
from diffpref.captions.charts import clip_charts, likeness_chart, token_charts
from diffpref.captions.conflict import Texts, conflict, measure
from diffpref.captions.encoders import CLIP_LIMIT, load_clip, load_tokenizer
from diffpref.captions.findings import findings, notes
from diffpref.captions.provenance import caption_command, left_out, method, provenance, stored_settings
from diffpref.captions.sheet import SheetRow, build_sheet
from diffpref.captions.survey import FLAGS, Row, Survey, survey
from diffpref.data.images import ImageError, decode_image
from diffpref.data.pairs import image_bytes, stable_hash
from diffpref.data.reader import RowReader
from diffpref.data.schema import Columns, PairFile, PickAPicColumns, check_schema, find_files, open_file
from diffpref.errors import UserError
from diffpref.paths import atomic_write_text
from diffpref.reporting.page import render_page

CLIP_PAIRS = 1000


def write_captions_report(
    folder: str | Path,
    out: str | Path,
    *,
    clip: str = "",
    device: str = "cpu",
    clip_pairs: int = CLIP_PAIRS,
    tokenizer: str = "",
    columns: Columns | None = None,
) -> dict[str, Any]:
    """Look through dual-caption pairs and write `out` (HTML) and, beside it, the same numbers as .json.

    Texts are read once, batch by batch; images of the sample sheet and, for `clip`, of `clip_pairs` pairs
    that their hashes choose. Memory does not grow with the number of rows.

    Args:
        folder: Parquet file, folder or glob with `caption_0` and `caption_1`; what `diffpref caption` stores
            beside (tokens, origins) is used where it is there.
        clip: folder or hub id of a CLIPModel, on `device`; "": no similarities to images.
        tokenizer: folder or hub id that counts tokens where the files do not, and those of prompts.

    Returns:
        The content of the JSON file.

    Raises:
        UserError: no such files, columns missing, a damaged file, no row with two captions, no such model.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out must end in .html, not {out.name!r}", fix=f"--out {out}.html")
    columns = columns or PickAPicColumns()
    files = _open(folder, columns)
    counter = load_tokenizer(tokenizer) if tokenizer else None
    encoder = load_clip(clip, device) if clip else None
    limit = counter.limit if counter else CLIP_LIMIT
    found = survey(files, columns, limit, clip_pairs if encoder else 0, counter)
    if not found.captioned:
        why = f"{found.rows} rows were read"
        raise UserError(f"no row of {folder} has two captions", why, "make them: diffpref caption")
    sheet = build_sheet(found.sample(), files, columns, limit)
    report = _numbers(found, files, limit, counter.name if counter else "")
    report["conflict"] = _conflict(found, files, columns, encoder, clip) if encoder else None
    options = {"clip": clip, "clip_pairs": str(clip_pairs) if clip else "", "tokenizer": tokenizer}
    report["commands"] = _commands(report, files, folder, out, options)
    report["sample"] = [_sampled(row) for row in sheet]
    report["notes"] = notes(report)
    page = _render(report, sheet)
    try:
        atomic_write_text(out, page)
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        atomic_write_text(out.with_suffix(".json"), text + "\n")
    except OSError as error:
        raise UserError(f"cannot write {out}", why=str(error.strerror or error)) from error
    return report


def _open(folder: str | Path, columns: Columns) -> list[PairFile]:
    files = [open_file(path) for path in find_files(folder)]
    for file in files:
        check_schema(file, columns, "dual", option="--columns.{} {}")
    return files


def _numbers(found: Survey, files: Sequence[PairFile], limit: int, tokenizer: str) -> dict[str, Any]:
    sources, stored = provenance(found), stored_settings(files)
    return {
        "folder": str(files[0].path.parent),
        "files": [file.path.name for file in files],
        "method": method(sources),
        **findings(found, limit, tokenizer or str(stored.get("tokenizer") or "")),
        "provenance": sources,
        "settings": stored,
        "left_out": left_out(files),
        "versions": {"diffpref": __version__},
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _conflict(
    found: Survey, files: Sequence[PairFile], columns: Columns, encoder: Any, name: str
) -> dict[str, Any] | None:
    """None where no pair of the sample has a preference and two images that can be decoded."""
    rows = sorted(found.clip_rows.items(), key=lambda row: row.number)
    used: list[Row] = []
    cosines = measure(encoder, _clip_pairs(rows, files, columns, used))
    if not used:
        return None
    units = [stable_hash(row.prompt) if row.prompt else row.id for row in used]
    of = found.captioned - found.undecided
    return {"model": name, "of": of, "undecodable": len(rows) - len(used), **conflict(cosines, units)}


def _clip_pairs(
    rows: Sequence[Row], files: Sequence[PairFile], columns: Columns, used: list[Row]
) -> Iterator[tuple[Texts, Image.Image, Image.Image]]:
    """Texts, winner and loser of each row that can be decoded; those rows are appended to `used`."""
    reader = RowReader(files)
    for row in tqdm(rows, desc="CLIP", unit="pair", file=sys.stderr, disable=None):
        assert row.winner is not None
        cells = reader.read(row.number, (columns.image_0, columns.image_1))
        try:
            images = [decode_image(image_bytes(cells[n])) for n in (columns.image_0, columns.image_1)]
        except ImageError:
            continue
        used.append(row)
        winner, loser = row.winner, 1 - row.winner
        yield Texts(row.prompt, row.captions[winner], row.captions[loser]), images[winner], images[loser]


def _commands(
    report: dict[str, Any], files: Sequence[PairFile], place: str | Path, out: Path, options: dict[str, str]
) -> list[str]:
    made = caption_command(report["provenance"], report["settings"], files[0].path.parent)
    given = [f for name, text in options.items() if text for f in (f"--{name.replace('_', '-')}", text)]
    again = shlex.join(["diffpref", "caption-report", str(place), "--out", str(out), *given])
    return [made, again] if made else [again]


def _sampled(shown: SheetRow) -> dict[str, Any]:
    row = shown.row
    return {
        "file": shown.file,
        "row": shown.file_row,
        "winner": row.winner,
        "prompt": row.prompt,
        "captions": list(row.captions),
        "tokens": list(row.tokens),
        "similarity": row.similarity,
        "flags": list(row.flags),
    }


def _render(report: dict[str, Any], sheet: Sequence[SheetRow]) -> str:
    tokens, alike, clip = report["tokens"], report["near_duplicates"], report["conflict"]
    return render_page(
        "captions.html.j2",
        styles=["report.css", "captions.css"],
        script="captions.js",
        report=report,
        sheet=sheet,
        flags={flag: sum(flag in row.row.flags for row in sheet) for flag in FLAGS},
        token_charts=token_charts(tokens) if tokens else {},
        alike_chart=likeness_chart(alike),
        clip_charts=clip_charts(clip["similarity"]) if clip else {},
    )
