"""Pick-a-Pic v1 and v2, Pick-Style, Pick-Safety, Pick-Double-Caption: Parquet with the images inside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.data.schema import (
    HAS_LABEL,
    OTHER_LABEL,
    PairFile,
    PickAPicColumns,
    check_schema,
    find_files,
    first_line,
    is_text,
    open_file,
)
from diffpref.data.sources.base import (
    BAD_IMAGE,
    MALFORMED,
    Candidate,
    Request,
    RowProblem,
    Source,
    Wanted,
    check_opposite,
    name_columns,
    read_label,
    relative_names,
)
from diffpref.errors import UserError
from diffpref.files import LARGEST_IMAGE
from diffpref.texts import LONGEST

BATCH = 32
BUFFER = 2**20
OWN_CAPTIONS = ("caption_0", "caption_1")
KEPT_TEXTS = ("image_0_uid", "image_1_uid", "model_0", "model_1")
"""Columns of Pick-a-Pic that are kept where they are: who drew the images, and which they are."""


def open_pick_a_pic(request: Request) -> Source:
    """Pairs with one caption; `caption_0` and `caption_1` are not looked at."""
    named = [f"{key}={request.columns[key]}" for key in OWN_CAPTIONS if key in request.columns]
    if named:
        raise UserError(
            f"--columns {' '.join(named)} has no effect with --format pick-a-pic",
            why="its pairs share one caption",
            fix="leave it out, or give --format pick-double-caption",
        )
    return _open(request, dual=False)


def open_pick_double_caption(request: Request) -> Source:
    """Pairs whose images have captions of their own, beside the prompt."""
    return _open(request, dual=True)


def has_own_captions(request: Request) -> bool:
    """Whether each image is to have a caption of its own: the user names the columns, or the first file has
    both under their usual names."""
    if not request.columns.keys().isdisjoint(OWN_CAPTIONS):
        return True
    return set(OWN_CAPTIONS) <= set(open_file(find_files(request.place)[0]).schema.names)


def _open(request: Request, dual: bool) -> Source:
    if request.images is not None:
        raise UserError("--images has no effect: Parquet files hold the images", fix="leave --images out")
    columns = PickAPicColumns(**name_columns(request, asdict(PickAPicColumns())))
    files = relative_names(find_files(request.place))
    opened = {name: open_file(path) for name, path in files.items()}
    for file in opened.values():
        check_schema(file, columns, "shared", "--columns {}={}")
        if dual:
            check_schema(file, columns, "dual", "--columns {}={}")
    schemas = [file.schema for file in opened.values()]
    extra = {name: pa.string() for name in KEPT_TEXTS if any(_has_text(schema, name) for schema in schemas)}
    rows = sum(file.rows for file in opened.values())

    def read(wanted: Wanted) -> Iterator[Candidate | int]:
        first = 0
        for name, file in opened.items():
            yield from _read_file(name, file, first, columns, dual, list(extra), wanted)
            first += file.rows

    return Source(files=files, read=read, dual=dual, extra=extra, key={"columns": asdict(columns)}, rows=rows)


def _read_file(
    name: str,
    file: PairFile,
    first: int,
    columns: PickAPicColumns,
    dual: bool,
    extra: list[str],
    wanted: Wanted,
) -> Iterator[Candidate | int]:
    """Candidates of one file whose first row has the number `first`; whole row groups are left out unread."""
    texts = [columns.caption, *((columns.caption_0, columns.caption_1) if dual else ())]
    extra = [column for column in extra if _has_text(file.schema, column)]
    labels = [column for column in (HAS_LABEL, OTHER_LABEL) if column in file.schema.names]
    needed = list(dict.fromkeys((*texts, columns.image_0, columns.image_1, columns.label_0, *labels, *extra)))
    row = 0
    with _opened(name, file) as parquet:
        for group, rows in enumerate(file.group_rows):
            if not wanted(first + row, first + row + rows):
                yield rows
                row += rows
                continue
            if group in file.faults:
                problem = (BAD_IMAGE, file.faults[group])
                yield from (Candidate(name, n, f"row {n}", problem=problem) for n in range(row, row + rows))
                row += rows
                continue
            for batch in _batches(parquet, group, needed, name, row):
                for offset in range(batch.num_rows):
                    if wanted(first + row, first + row + 1):
                        yield _candidate(name, row, batch, offset, columns, dual, extra)
                    else:
                        yield 1
                    row += 1


def _opened(name: str, file: PairFile) -> pq.ParquetFile:
    """With a buffer a column is streamed; mapped or read plainly, a whole row group would count as our
    memory."""
    try:
        return pq.ParquetFile(file.path, buffer_size=BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        raise UserError(f"{name} cannot be read", first_line(error), "fetch it again") from error


def _batches(
    parquet: pq.ParquetFile, group: int, needed: Sequence[str], name: str, row: int
) -> Iterator[pa.RecordBatch]:
    try:
        yield from parquet.iter_batches(BATCH, row_groups=[group], columns=list(needed), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{name} cannot be read in the row group that starts at row {row}",
            why=f"the Parquet file is damaged: {first_line(error)}",
            fix="fetch it again",
        ) from error


def _candidate(
    name: str,
    row: int,
    batch: pa.RecordBatch,
    offset: int,
    columns: PickAPicColumns,
    dual: bool,
    extra: list[str],
) -> Candidate:
    label, problem = math.nan, None
    try:
        cells = {column: _cell(column, batch.column(column)[offset]) for column in batch.schema.names}
    except UnicodeDecodeError:
        return Candidate(name, row, f"row {row}", problem=(MALFORMED, "its text is not UTF-8"))
    except RowProblem as error:
        return Candidate(name, row, f"row {row}", problem=(error.reason, error.text))
    try:
        if cells.get(HAS_LABEL, True):
            label = read_label(cells[columns.label_0])
            if OTHER_LABEL in cells and columns.label_0 != OTHER_LABEL:
                check_opposite(label, read_label(cells[OTHER_LABEL]))
    except RowProblem as error:
        problem = (error.reason, error.text)
    return Candidate(
        file=name,
        row=row,
        where=f"row {row}",
        caption=cells[columns.caption],
        images=(_image_bytes(cells[columns.image_0]), _image_bytes(cells[columns.image_1])),
        label=label,
        captions=(cells[columns.caption_0], cells[columns.caption_1]) if dual else None,
        extra={column: cells[column] for column in extra},
        problem=problem,
    )


def _cell(name: str, scalar: pa.Scalar) -> Any:
    """A cell as a Python value. Raises RowProblem for one that is too long to copy."""
    data = scalar["bytes"] if isinstance(scalar, pa.StructScalar) and scalar.is_valid else scalar
    if isinstance(data, pa.BinaryScalar) and data.is_valid:
        text = isinstance(data, (pa.StringScalar, pa.LargeStringScalar, pa.StringViewScalar))
        size, most = data.as_buffer().size, 4 * LONGEST if text else LARGEST_IMAGE  # bytes of a character
        if size > most:
            reason = MALFORMED if text else BAD_IMAGE
            raise RowProblem(reason, f"{name} has {size:,} bytes, more than {most:,}")
    return scalar.as_py()


def _image_bytes(value: Any) -> bytes | None:
    """Bytes of an image cell: plain bytes, or the {bytes, path} struct of Hugging Face datasets."""
    if isinstance(value, dict):
        value = value["bytes"]
    return value if value is None or isinstance(value, bytes) else bytes(value)


def _has_text(schema: pa.Schema, name: str) -> bool:
    return schema.names.count(name) == 1 and is_text(schema.field(name).type)
