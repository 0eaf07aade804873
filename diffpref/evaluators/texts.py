"""How a text becomes tokens of a CLIP network, as the reference implementations do it."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any, Literal

from diffpref.errors import UserError
from diffpref.evaluators.clip import Tokens

EVAL_EXTRA = "pip install 'diffpref[eval]'"

Overflow = Literal["keep the end token", "drop the end token"]


@dataclass(frozen=True)
class BytePairs:
    """Tokens of transformers' CLIP tokenizer, cut to ``limit``.

    cleaned: repair broken characters (ftfy) and replace HTML entities twice first, as OpenAI's own tokenizer
    does and transformers' does not: ``&amp;`` is then ``&``. overflow: a text beyond the limit keeps the end
    token as its last (transformers, OpenAI), or loses it (torchmetrics): the network then reads out the state
    of the *start* token, which is the same for all texts.
    """

    tokenizer: Any
    limit: int
    cleaned: bool = False
    overflow: Overflow = "keep the end token"

    def __call__(self, text: str) -> Tokens:
        ids = self.tokenizer(clean(text) if self.cleaned else text, verbose=False)["input_ids"]
        if len(ids) <= self.limit:
            return Tokens(tuple(ids))
        cut = len(ids) - self.limit
        if self.overflow == "drop the end token":
            return Tokens(tuple(ids[: self.limit]), cut)
        return Tokens((*ids[: self.limit - 1], ids[-1]), cut)

    def describe(self) -> dict[str, Any]:
        return {
            "tokenizer": "byte pairs",
            "vocabulary": len(self.tokenizer),
            "limit": self.limit,
            "cleaned": self.cleaned,
            "overflow": self.overflow,
        }


def clean(text: str) -> str:
    """OpenAI's cleaning. Lower case and white space are the tokenizer's own affair."""
    try:
        import ftfy
    except ImportError as error:
        raise UserError(
            "OpenAI's text preparation needs the package ftfy", why=str(error), fix=EVAL_EXTRA
        ) from error
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()
