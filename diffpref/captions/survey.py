"""One pass over the rows of dual-caption pairs: counts of everything, and which rows to look at."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from diffpref.captions.statistics import Repeats, Smallest, unit_bin
from diffpref.captions.wording import NEAR_DUPLICATE, similarity, words
from diffpref.data.pairs import pair_id
from diffpref.data.scan import column_batches
from diffpref.data.schema import HAS_LABEL, Columns, PairFile
from diffpref.errors import UserError
from diffpref.texts import is_blank

FAIR, PER_FLAG = 36, 4
"""Rows of the sample sheet: so many of all, and so many more of each kind that deserves a look."""
SIMILARITY_BINS = 20
SOURCES_NAMED = 50
UNCHANGED, CUT, EQUAL, NEAR, UNDECIDED = "unchanged", "cut", "equal", "near-duplicate", "no preference"
FLAGS = (UNCHANGED, CUT, EQUAL, NEAR, UNDECIDED)
ROLES = ("winner", "loser")
UNKNOWN_LEVEL = "unknown"
TOKENS = {"tokens_0": "caption_0", "tokens_1": "caption_1", "prompt_tokens": "prompt"}
KEYS = ("prompt", "caption_0", "caption_1", "label", "has_label", "origin_0", "origin_1", *TOKENS)

Origin = dict[str, Any]


class Tokenizer(Protocol):
    """Counts the tokens of texts, BOS and EOS among them; a text encoder reads the first `limit`."""

    @property
    def name(self) -> str: ...
    @property
    def limit(self) -> int: ...

    def count(self, texts: Sequence[str]) -> list[int]: ...


@dataclass(frozen=True)
class Row:
    """A pair without its images. Tuples hold image 0's and 1's; `winner` is the preferred image or None.

    number: counted through all files. flags: of FLAGS, what a reader may want to look for.
    """

    number: int
    id: int
    prompt: str
    captions: tuple[str, str]
    winner: int | None
    tokens: tuple[int | None, int | None]
    origins: tuple[Origin | None, Origin | None]
    similarity: float
    flags: tuple[str, ...]

    def role(self, side: int) -> str:
        """What the image of that side is: "winner", "loser" or "" without a preference."""
        return "" if self.winner is None else ROLES[side != self.winner]


@dataclass
class Survey:
    """What the pass found. Lengths, repeats and sources are by role; `clip_rows` are decided ones."""

    rows: int = 0
    missing: int = 0
    undecided: int = 0
    equal: int = 0
    near: int = 0
    similarities: list[int] = field(default_factory=lambda: [0] * SIMILARITY_BINS)
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    repeats: dict[str, Repeats] = field(default_factory=lambda: defaultdict(Repeats))
    perturbed: Counter[str] = field(default_factory=Counter)
    unchanged: Counter[str] = field(default_factory=Counter)
    sources: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    fair: Smallest[Row] = field(default_factory=lambda: Smallest(FAIR))
    flagged: dict[str, Smallest[Row]] = field(
        default_factory=lambda: {flag: Smallest(FAIR + PER_FLAG) for flag in FLAGS}
    )
    clip_rows: Smallest[Row] = field(default_factory=lambda: Smallest(0))

    @property
    def captioned(self) -> int:
        """Rows with two captions: all that is said of captions is said of these."""
        return self.rows - self.missing

    def sample(self) -> list[Row]:
        """The rows of the sheet, in their order: the fair ones, and more of each flag where there are."""
        chosen = {row.number: row for row in self.fair.items()}
        for flag in FLAGS:
            more = [row for row in self.flagged[flag].items() if row.number not in chosen]
            chosen |= {row.number: row for row in more[:PER_FLAG]}
        return [chosen[number] for number in sorted(chosen)]


def survey(
    files: Sequence[PairFile], columns: Columns, limit: int, clip_pairs: int, tokenizer: Tokenizer | None
) -> Survey:
    """Read all but the images of all files. clip_pairs: rows to keep for a CLIP model.

    Raises UserError when a file is damaged.
    """
    found = Survey(clip_rows=Smallest(clip_pairs))
    first = 0
    for number, file in enumerate(files):
        row, names = 0, column_names(file.schema, columns)
        for batch in column_batches(file, list(dict.fromkeys(names.values()))):
            for cells in _rows(batch, names, tokenizer):
                _add(found, _row(cells, first + row, pair_id(number, row), limit), cells)
                row += 1
        first += file.rows
    return found


def column_names(schema: pa.Schema, columns: Columns) -> dict[str, str]:
    """The columns that the pass reads, by our own keys; what is absent or of another type is left out."""
    names = {
        "prompt": columns.caption, "caption_0": columns.caption_0, "caption_1": columns.caption_1,
        "label": columns.label_0, "has_label": HAS_LABEL, "tokens_0": "tokens_0", "tokens_1": "tokens_1",
        "origin_0": "origin_0", "origin_1": "origin_1",
    }  # fmt: skip
    wanted = {"tokens": pa.types.is_integer, "origin": pa.types.is_struct}
    return {
        key: name
        for key, name in names.items()
        if name in schema.names and wanted.get(key[:-2], lambda _: True)(schema.field(name).type)
    }


def _rows(
    batch: pa.RecordBatch, names: dict[str, str], tokenizer: Tokenizer | None
) -> Iterator[dict[str, Any]]:
    """Cells of each row by our own keys; absent columns are null."""
    cells: dict[str, list[Any]] = {}
    for key in KEYS:
        try:
            cells[key] = batch.column(names[key]).to_pylist() if key in names else [None] * batch.num_rows
        except UnicodeDecodeError as error:
            fix = "turn the pairs into Parquet of ours first: diffpref convert"
            raise UserError(f"column {names[key]!r} holds text that is not UTF-8", str(error), fix) from error
    if tokenizer is not None:
        for key, texts in TOKENS.items():
            if all(value is None for value in cells[key]):
                counted = iter(tokenizer.count([text for text in cells[texts] if text]))
                cells[key] = [next(counted) if text else None for text in cells[texts]]
    for values in zip(*cells.values(), strict=True):
        yield dict(zip(cells, values, strict=True))


def _row(cells: dict[str, Any], number: int, row_id: int, limit: int) -> Row | None:
    """None for a row without two captions."""
    captions = (cells["caption_0"] or "", cells["caption_1"] or "")
    if any(map(is_blank, captions)):
        return None
    label = cells["label"] if cells["has_label"] in (None, True) else None
    winner = 0 if label == 1 else 1 if label == 0 else None  # label_0 of 1: image 0 is preferred
    tokens = (cells["tokens_0"], cells["tokens_1"])
    origins = (cells["origin_0"], cells["origin_1"])
    alike = similarity(words(captions[0]), words(captions[1]))
    flags = {
        UNCHANGED: any(_unchanged(origin) for origin in origins if origin),
        CUT: any(count is not None and count > limit for count in tokens),
        EQUAL: captions[0] == captions[1],
        NEAR: alike >= NEAR_DUPLICATE,
        UNDECIDED: winner is None,
    }
    raised = tuple(flag for flag, is_raised in flags.items() if is_raised)
    return Row(number, row_id, cells["prompt"] or "", captions, winner, tokens, origins, alike, raised)


def _add(found: Survey, row: Row | None, cells: dict[str, Any]) -> None:
    found.rows += 1
    if row is None:
        found.missing += 1
        return
    found.undecided += row.winner is None
    found.equal += EQUAL in row.flags
    found.near += NEAR in row.flags
    found.similarities[unit_bin(row.similarity, SIMILARITY_BINS)] += 1
    for side in (0, 1):
        role = row.role(side) or UNDECIDED
        found.repeats[role].add(row.captions[side])
        tokens = row.tokens[side]
        if tokens is not None:
            found.lengths[role][tokens] += 1
        _add_origin(found, role, row.origins[side])
    if row.prompt:
        found.repeats["prompt"].add(row.prompt)
    if cells["prompt_tokens"] is not None:
        found.lengths["prompt"][cells["prompt_tokens"]] += 1
    found.fair.add(row.id, row)
    for flag in row.flags:
        found.flagged[flag].add(row.id, row)
    if row.winner is not None:
        found.clip_rows.add(row.id, row)


def _add_origin(found: Survey, role: str, origin: Origin | None) -> None:
    if origin is None:
        return
    perturber = origin.get("perturber")
    if perturber:
        level = perturber.get("level") or UNKNOWN_LEVEL
        found.perturbed[level] += 1
        found.unchanged[level] += _unchanged(origin)
    key = (role, origin.get("source") or "", _frozen(origin.get("captioner")), _frozen(perturber))
    if key in found.sources or len(found.sources) < SOURCES_NAMED:
        found.sources[key] += 1
    else:
        found.sources[("other", "", (), ())] += 1


def _unchanged(origin: Origin) -> bool:
    return bool(origin.get("perturber")) and origin.get("changed") is False


def _frozen(values: dict[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    return tuple((values or {}).items())
