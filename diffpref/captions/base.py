"""What a captioner and a perturber are: functions from lists to lists, in which no item depends on another.

DCPO (arXiv 2502.06023) trains with a caption for each image of a pair. A captioner writes one from an image
and its prompt, a perturber writes a worse one from a caption; "hybrid" is the second applied to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, get_args

from diffpref.errors import UserError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

Level = Literal["weak", "medium", "strong"]
"""How far a perturbed caption goes: DCPO's lexical diversity 40, 60 and 80."""
LEVELS: tuple[Level, ...] = get_args(Level)


class Edit(NamedTuple):
    """One change: what kind of word it is, what stood there and what stands there now ("" where dropped)."""

    kind: str
    before: str
    after: str


class Perturbed(NamedTuple):
    """A perturbed caption. `changed` is False exactly where `text` is the caption itself, without edits.

    The edits follow the order in which they were chosen, in lower case; articles that had to agree are not
    among them. Models name none. failure says why a model gave nothing that can be used; `text` is then the
    caption itself.
    """

    text: str
    changed: bool
    edits: tuple[Edit, ...] = ()
    failure: str = ""


class Captioned(NamedTuple):
    """A caption, or why there is none: exactly one of the two is empty.

    A failure is one of this image alone (refused, empty or unreadable answer); what concerns every image (no
    server, wrong key, no memory) is a UserError and stops the run.
    """

    text: str
    failure: str = ""


@dataclass(frozen=True)
class Provenance:
    """Where a caption comes from; stored with every row.

    backend: its name in CAPTIONERS or PERTURBERS. model: id, path or what the server calls it; "" for rules.
    revision: the hub's commit, a hash of the weights, or a version of ours. template: the first 16 digits of
    the SHA-256 of the instruction, "" without one. level: "" for captioners.
    """

    backend: str
    model: str = ""
    revision: str = ""
    template: str = ""
    seed: int = 0
    level: str = ""


class Perturber(Protocol):
    """A frozen dataclass of parameters, among them `level` and `seed`.

    The result for a caption is a function of the parameters, the caption and its row alone: batches may be
    cut anywhere, resumed and spread over machines.
    """

    def __call__(self, captions: Sequence[str], rows: Sequence[int]) -> list[Perturbed]:
        """A perturbed version of each caption. rows: the number of each in its table, the random stream."""
        ...

    def provenance(self) -> Provenance:
        """What to store beside its captions; loads the model where the revision takes that."""
        ...


class Captioner(Protocol):
    """A frozen dataclass of parameters. The caption of an image never depends on the rest of the batch."""

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], rows: Sequence[int]
    ) -> list[Captioned]:
        """A caption of what each RGB image shows; the prompt it was made from is context, not truth.

        rows: the random stream of each, 2 x row of its pair + 0 or 1 for the image.
        """
        ...

    def provenance(self) -> Provenance:
        """What to store beside its captions; loads the model where the revision takes that."""
        ...


def require_level(level: str) -> None:
    """Raise UserError naming the levels unless `level` is one of them."""
    if level not in LEVELS:
        guess = nearest(str(level), LEVELS)
        raise UserError(
            f"perturbation level {level!r} does not exist",
            why=f"the levels are {', '.join(LEVELS)}",
            fix=f"did you mean {guess!r}?" if guess else "choose one of them",
        )


def require_rows(captions: Sequence[str], rows: Sequence[int]) -> None:
    """Raise ValueError unless there is a row for each caption."""
    if len(captions) != len(rows):
        raise ValueError(f"{len(captions)} captions but {len(rows)} rows: each caption needs its row")
