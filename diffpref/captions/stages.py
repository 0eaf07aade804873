"""The stages of `diffpref caption`, each a function of Arrow batches and a backend, without state:

slice -> decode -> caption -> perturb -> add_columns

`decode` needs no model and runs ahead in a thread; `caption` and `perturb` call the backends; what they give
is a batch of MADE, which is all that must be kept of a batch to go on after a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, get_args

import pyarrow as pa
from PIL import Image

from diffpref.captions.answers import UNREADABLE
from diffpref.captions.base import Captioner, Perturber, Provenance
from diffpref.captions.source import Slice
from diffpref.data.images import ImageError, decode_image
from diffpref.data.pairs import image_bytes
from diffpref.data.scan import read_labels
from diffpref.data.schema import Columns
from diffpref.texts import is_blank

Method = Literal["captioning", "perturbation", "hybrid"]
METHODS: tuple[Method, ...] = get_args(Method)
NO_PROMPT, BAD_IMAGE, NO_CAPTION, NOT_PERTURBED = "no_prompt", "bad_image", "captioner", "perturber"
UNREAD = "unreadable_answer"
REASONS = {
    NO_PROMPT: "without a prompt",
    BAD_IMAGE: "with an image that cannot be decoded",
    NO_CAPTION: "that the captioner failed on",
    NOT_PERTURBED: "that the perturber failed on",
    UNREAD: "of whose model's answer no caption could be taken",
}
"""Why a row is left out, and how reports call it."""

MADE = pa.schema(
    [
        ("caption_0", pa.string()), ("caption_1", pa.string()), ("before", pa.string()),
        ("changed", pa.bool_()), ("reason", pa.string()), ("detail", pa.string()),
    ]
)  # fmt: skip
"""What the backends made of each row of a slice. before: the loser's caption before it was perturbed, where
it had one of its own. changed: by the perturber; null where there was none. reason: "" or why the row is left
out (then nothing else but `detail` is set)."""

_MAKER = {"backend": pa.string(), "model": pa.string(), "revision": pa.string(), "template": pa.string()}
ORIGIN = pa.struct(
    {
        "source": pa.string(),
        "captioner": pa.struct({**_MAKER, "seed": pa.int64()}),
        "perturber": pa.struct({**_MAKER, "level": pa.string(), "seed": pa.int64()}),
        "changed": pa.bool_(),
        "before": pa.string(),
    }
)
PROMPT, CAPTIONER, PERTURBER, BOTH = "prompt", "captioner", "perturber", "captioner+perturber"


class Row(NamedTuple):
    """One pair, ready for the backends. loser: 0 or 1, None without a preference. reason: as in MADE."""

    number: int
    prompt: str
    images: tuple[Image.Image, Image.Image] | None
    loser: int | None
    reason: str = ""
    detail: str = ""


def losers(piece: Slice, columns: Columns) -> list[int | None]:
    """Which image of each row lost; None for ties and rows without a label. Raises UserError as
    `read_labels`."""
    labelled, labels = read_labels(piece.batch, piece.path, piece.place, columns)
    decided = labelled & (labels != 0.5)
    return [
        int(first_wins) if is_decided else None
        for is_decided, first_wins in zip(decided.tolist(), (labels == 1).tolist(), strict=True)
    ]


def decode(
    piece: Slice, columns: Columns, with_images: bool, threads: ThreadPoolExecutor | None = None
) -> list[Row]:
    """The rows of a slice: prompts, decoded images (with_images), and who lost."""
    prompts = _texts(piece.batch.column(columns.caption))
    lost = losers(piece, columns)
    numbers = range(piece.row, piece.row + len(prompts))
    if not with_images:
        pairs: list[Any] = [None] * len(prompts)
    else:
        cells = [
            (columns.image_0, columns.image_1, first, second)
            for first, second in zip(
                piece.batch.column(columns.image_0).to_pylist(),
                piece.batch.column(columns.image_1).to_pylist(),
                strict=True,
            )
        ]
        pairs = list(threads.map(_decode_pair, cells) if threads else map(_decode_pair, cells))
    rows = []
    for number, prompt, pair, loser in zip(numbers, prompts, pairs, lost, strict=True):
        if not prompt or is_blank(prompt):
            detail = f"{columns.caption} is null or empty"
            rows.append(Row(number, "", None, loser, NO_PROMPT, detail))
        elif isinstance(pair, str):
            rows.append(Row(number, prompt, None, loser, BAD_IMAGE, pair))
        else:
            rows.append(Row(number, prompt, pair, loser))
    return rows


def _decode_pair(cells: tuple[str, str, Any, Any]) -> tuple[Image.Image, Image.Image] | str:
    """Both images, or what is wrong with the first that cannot be decoded."""
    name = cells[0]
    try:
        first = decode_image(image_bytes(cells[2]))
        name = cells[1]
        return first, decode_image(image_bytes(cells[3]))
    except ImageError as error:
        return f"{name}: {error.reason}"


def make(
    rows: Sequence[Row], method: Method, captioner: Captioner | None, perturber: Perturber | None
) -> pa.RecordBatch:
    """What the backends of a method make of a batch of rows, as MADE."""
    made = caption(rows, captioner) if captioner is not None else _prompts(rows)
    if perturber is not None:
        made = perturb(rows, made, perturber, keep_before=method == "hybrid")
    return pa.RecordBatch.from_pylist(made, schema=MADE)


def caption(rows: Sequence[Row], captioner: Captioner) -> list[dict[str, Any]]:
    """Both images of each row captioned."""
    asked = [row for row in rows if not row.reason and row.images is not None]
    images = [image for row in asked for image in row.images or ()]
    prompts = [row.prompt for row in asked for _ in (0, 1)]
    numbers = [2 * row.number + side for row in asked for side in (0, 1)]
    found = iter(captioner(images, prompts, numbers) if asked else [])
    made = []
    for row in rows:
        if row.reason:
            made.append(_failed(row.reason, row.detail))
            continue
        both = [next(found), next(found)]
        problems = [one.failure or _problem(one.text) for one in both]
        failures = [f"image {side}: {problem}" for side, problem in enumerate(problems) if problem]
        texts = {f"caption_{side}": one.text for side, one in enumerate(both)}
        made.append(_failed(_reason(NO_CAPTION, problems), failures[0]) if failures else _made(**texts))
    return made


def perturb(
    rows: Sequence[Row], made: Sequence[dict[str, Any]], perturber: Perturber, keep_before: bool
) -> list[dict[str, Any]]:
    """The loser's caption of each row perturbed; rows without a preference or a caption stay as they are.

    keep_before: whether the caption before is kept beside it.
    """
    asked = [i for i, row in enumerate(rows) if row.loser is not None and not made[i]["reason"]]
    before = [made[i][f"caption_{rows[i].loser}"] for i in asked]
    found = perturber(before, [rows[i].number for i in asked]) if asked else []
    after = list(made)
    for i, text, one in zip(asked, before, found, strict=True):
        problem = one.failure or _problem(one.text)
        if problem:
            after[i] = _failed(_reason(NOT_PERTURBED, [problem]), problem)
        else:
            kept = {"before": text} if keep_before else {}
            after[i] = made[i] | {f"caption_{rows[i].loser}": one.text, "changed": one.changed, **kept}
    return after


def add_columns(
    piece: Slice,
    made: pa.RecordBatch,
    columns: Columns,
    makers: tuple[Provenance | None, Provenance | None],
    count: Callable[[Sequence[str]], list[int]] | None,
) -> pa.Table:
    """The captioned rows of a slice with all their columns and the new ones; rows that failed are left out.

    makers: provenance of the captioner and the perturber. count: tokens of texts; None: their columns are
    null.
    """
    kept = [i for i, reason in enumerate(made.column("reason").to_pylist()) if not reason]
    whole = len(kept) == made.num_rows
    rows_kept = [piece.batch] if whole else [piece.batch.slice(i, 1) for i in kept]  # `take` knows no views
    table = pa.Table.from_batches(rows_kept, piece.batch.schema)
    lost = losers(piece, columns)
    rows = [(row, lost[i]) for i, row in enumerate(made.to_pylist()) if not row["reason"]]
    texts = [[row[f"caption_{side}"] for row, _ in rows] for side in (0, 1)]
    names = (columns.caption_0, columns.caption_1)
    new: list[tuple[str, pa.Array]] = [(names[side], pa.array(texts[side], pa.string())) for side in (0, 1)]
    for side in (0, 1):
        tokens = count(texts[side]) if count is not None else [None] * len(rows)
        new.append((f"tokens_{side}", pa.array(tokens, pa.int32())))
    for side in (0, 1):
        perturbed = [row if loser == side and row["changed"] is not None else None for row, loser in rows]
        new.append((f"origin_{side}", _origins(perturbed, makers)))
    added = [name for name, _ in new]
    table = table.drop_columns([name for name in table.column_names if name in added])
    for name, column in new:
        table = table.append_column(name, column)
    return table.replace_schema_metadata(None)


def added_columns(columns: Columns) -> dict[str, pa.DataType]:
    """Names and types of the columns that `add_columns` adds, in order."""
    return {
        columns.caption_0: pa.string(), columns.caption_1: pa.string(),
        "tokens_0": pa.int32(), "tokens_1": pa.int32(), "origin_0": ORIGIN, "origin_1": ORIGIN,
    }  # fmt: skip


def _origins(
    perturbed: Sequence[dict[str, Any] | None], makers: tuple[Provenance | None, Provenance | None]
) -> pa.StructArray:
    """Where the captions of one side come from. perturbed: the row where a perturber had a part."""
    captioner, perturber = makers
    plain, after = (CAPTIONER, BOTH) if captioner is not None else (PROMPT, PERTURBER)
    parts: list[Any] = [
        [plain if row is None else after for row in perturbed],
        _repeated(captioner, ORIGIN.field("captioner").type, [False] * len(perturbed)),
        _repeated(perturber, ORIGIN.field("perturber").type, [row is None for row in perturbed]),
        [None if row is None else row["changed"] for row in perturbed],
        [None if row is None else row["before"] for row in perturbed],
    ]
    arrays = [
        part if isinstance(part, pa.Array) else pa.array(part, field.type)
        for part, field in zip(parts, ORIGIN, strict=True)
    ]
    return pa.StructArray.from_arrays(arrays, fields=list(ORIGIN))


def _repeated(maker: Provenance | None, kind: pa.StructType, null: Sequence[bool]) -> pa.Array:
    """The provenance in every row but those that are `null`."""
    if maker is None:
        return pa.nulls(len(null), kind)
    one = pa.array([{field.name: getattr(maker, field.name) for field in kind}], kind)
    return one.take(pa.array([None if is_null else 0 for is_null in null], pa.int64()))


def _prompts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        _failed(row.reason, row.detail) if row.reason else _made(caption_0=row.prompt, caption_1=row.prompt)
        for row in rows
    ]


def _made(**texts: str) -> dict[str, Any]:
    return {**dict.fromkeys(MADE.names), "reason": "", "detail": "", **texts}


def _failed(reason: str, detail: str) -> dict[str, Any]:
    return {**dict.fromkeys(MADE.names), "reason": reason, "detail": detail}


def _reason(reason: str, problems: Sequence[str]) -> str:
    """UNREAD where the first of the problems is an answer that holds no caption, else `reason`."""
    first = next(problem for problem in problems if problem)
    return UNREAD if first.startswith(UNREADABLE) else reason


def _problem(text: str) -> str:
    """Why a caption cannot be stored; "" for one that can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the caption is not valid Unicode"
    return "the caption is blank" if is_blank(text) else ""


def _texts(column: pa.Array) -> list[str | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    texts: list[str | None] = column.to_pylist()
    return texts
