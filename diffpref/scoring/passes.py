"""One pass over the images: blocks of them, each decoded once for all evaluators, each kept when finished."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from diffpref.data.images import ImageError, decode_for_scoring
from diffpref.engine import ahead
from diffpref.environment import usable_cores
from diffpref.errors import UserError
from diffpref.files import reason_of
from diffpref.image_tables import ImageRow
from diffpref.processes import Processes
from diffpref.scoring.judges import Judge, owner
from diffpref.scoring.tables import ERROR, IDENTITY, Scores, identity_table

BLOCK = 64
"""Images of a block, at least: what a kill costs at most, and what processes share out."""
_DECODERS = 8
_KEYS = ("id", "prompt", "image_sha256")


def block_size(batch: int) -> int:
    """Images of a block: whole batches, so that a block's batches are the same in whatever run makes it."""
    return -(-BLOCK // batch) * batch


def score_blocks(
    images: Sequence[ImageRow],
    judges: Sequence[Judge],
    folder: Path,
    earlier: Scores | None,
    batch: int,
    processes: Processes,
    title: str,
) -> None:
    """Leave a part of each judge for each block of this process's share in `folder`.

    A part that is there already, and scores in `earlier`, are taken over when they belong to the very same
    images and prompts; every image is read and hashed for that, and decoded only when a judge wants it.
    """
    size = block_size(batch)
    mine = range(processes.rank, -(-len(images) // size), processes.world)
    total = sum(min(size, len(images) - block * size) for block in mine)
    with (
        ThreadPoolExecutor(min(_DECODERS, usable_cores())) as decoders,
        tqdm(total=total, unit="image", desc=title, disable=not processes.main, file=sys.stderr) as bar,
    ):

        def prepare(block: int) -> _Block:
            return _prepare(block, images[block * size : (block + 1) * size], judges, folder, earlier)

        with contextlib.closing(ahead(map(prepare, mine))) as blocks:
            for block in blocks:
                if block.judges:
                    for judge, table in _judge(block, batch, decoders, bar.update):
                        judge.write_part(folder, block.number, table)
                else:
                    bar.update(len(block.rows))


def gather(images: Sequence[ImageRow], judges: Sequence[Judge], folder: Path, batch: int) -> pa.Table:
    """The table of all parts: identity, the column `error` where an image is missing or damaged, scores.

    Raises UserError when a part is gone, which only another process can do.
    """
    size, names = block_size(batch), [judge.name for judge in judges]
    parts: list[pa.Table] = []
    for block in range(-(-len(images) // size)):
        rows = images[block * size : (block + 1) * size]
        found = [(judge, judge.read_part(folder, block)) for judge in judges]
        for judge, table in found:
            if table is None:
                raise UserError(
                    f"finished scores of {judge.name} are gone from {folder}",
                    why="another process finished or removed them meanwhile",
                    fix="run the same command again",
                )
        first = found[0][1]
        assert first is not None
        part = identity_table(rows, first["image_sha256"]).append_column(ERROR, first[ERROR])
        for _, table in found:
            assert table is not None
            for name in table.column_names:
                if name not in (*_KEYS, ERROR):
                    part = part.append_column(name, table[name])
        parts.append(part)
    # a block of bad images only has no details: they are null there
    joined = pa.concat_tables(parts, promote_options="default").combine_chunks()
    order = [*IDENTITY, ERROR]
    for judge in judges:
        own = [name for name in joined.column_names if owner(name, names) == judge.name]
        known = [name for name in judge.about["columns"] if name in own]
        order += dict.fromkeys([judge.name, *known, *own])
    return joined.select(order)


@dataclass(frozen=True)
class _Block:
    """A block as read. datas: bytes, or why there are none. judges: those that have not scored it."""

    number: int
    rows: Sequence[ImageRow]
    datas: list[bytes | ImageError]
    keys: pa.Table
    judges: list[Judge]


def _prepare(
    number: int, rows: Sequence[ImageRow], judges: Sequence[Judge], folder: Path, earlier: Scores | None
) -> _Block:
    datas = [_read(row) for row in rows]
    hashes = [hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else None for data in datas]
    keys = pa.table(
        {
            "id": [row.id for row in rows],
            "prompt": [row.prompt for row in rows],
            "image_sha256": pa.array(hashes, pa.string()),
        }
    )
    open_judges = []
    for judge in judges:
        part = judge.read_part(folder, number)
        if part is not None and part.select(_KEYS).equals(keys):
            continue
        known = earlier.slice(judge.name, judge.identity, keys) if earlier else None
        if known is None:
            open_judges.append(judge)
        else:
            judge.write_part(folder, number, known)
    return _Block(number, rows, datas, keys, open_judges)


def _read(row: ImageRow) -> bytes | ImageError:
    try:
        data = row.read()
        return ImageError("image is null") if data is None else data
    except FileNotFoundError:
        return ImageError("the file is missing")
    except OSError as error:
        return ImageError(reason_of(error))


def _judge(
    block: _Block, batch: int, decoders: ThreadPoolExecutor, judged: Callable[[int], Any]
) -> list[tuple[Judge, pa.Table]]:
    """Tables of the block's open judges. judged: called with the number of images after each batch."""
    count = len(block.rows)
    columns: dict[str, dict[str, list[Any]]] = {judge.name: {} for judge in block.judges}
    reasons: list[str | None] = [None] * count
    coming = [decoders.submit(_decode, data) for data in block.datas[:batch]]
    for start in range(0, count, batch):
        decoded = [future.result() for future in coming]
        following = block.datas[start + batch : start + 2 * batch]
        coming = [decoders.submit(_decode, data) for data in following]  # while the judges are at work
        good: dict[int, Image.Image] = {}
        for index, image in enumerate(decoded, start):
            if isinstance(image, ImageError):
                reasons[index] = image.reason
            else:
                good[index] = image
        rows = [block.rows[index] for index in good]
        for judge in block.judges if good else []:
            scored = judge.evaluate(
                list(good.values()), [row.prompt for row in rows], [row.where for row in rows]
            )
            for name, values in scored.items():
                column = columns[judge.name].setdefault(name, [None] * count)
                for index, value in zip(good, values, strict=True):
                    column[index] = value
        judged(len(decoded))
    keys = block.keys.append_column(ERROR, pa.array(reasons, pa.string()))
    return [(judge, _with_columns(keys, judge, columns[judge.name])) for judge in block.judges]


def _decode(data: bytes | ImageError) -> Image.Image | ImageError:
    if isinstance(data, ImageError):
        return data
    try:
        return decode_for_scoring(data)
    except ImageError as error:
        return error


def _with_columns(table: pa.Table, judge: Judge, columns: dict[str, list[Any]]) -> pa.Table:
    for name, values in (columns or {judge.name: [None] * len(table)}).items():
        text = any(isinstance(value, str) for value in values)
        if not text:
            values = [None if value is None else np.float32(value) for value in values]
        table = table.append_column(name, pa.array(values, pa.string() if text else pa.float32()))
    return table
