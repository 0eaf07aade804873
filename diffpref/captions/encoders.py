"""Tokenizers of text encoders, by which captions are measured. Loaded when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffpref.errors import UserError
from diffpref.paths import resolve_or_hub_id

T = TypeVar("T")
CLIP_LIMIT = 77
"""Tokens, BOS and EOS among them, that the text encoders of Stable Diffusion read."""
_ENDLESS = 10**6  # tokenizers without a limit of their own say 10**30


@dataclass(frozen=True)
class TextTokenizer:
    """Counts tokens, BOS and EOS among them. limit: how many its text encoder reads."""

    name: str
    limit: int
    tokenizer: Any

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, none cut."""
        if not texts:
            return []
        found = self.tokenizer(list(texts), truncation=False, verbose=False).input_ids
        return [len(ids) for ids in found]


def load_tokenizer(name: str) -> TextTokenizer:
    """The tokenizer of a folder or hub id: of a tokenizer, or of a pipeline with one in `tokenizer/`.

    Raises UserError when there is none.
    """
    from transformers import AutoTokenizer

    place = resolve_or_hub_id(name, "tokenizer")
    inside = isinstance(place, Path) and (place / "tokenizer").is_dir()

    def load() -> Any:
        if isinstance(place, Path):
            return AutoTokenizer.from_pretrained(place / "tokenizer" if inside else place)
        try:
            return AutoTokenizer.from_pretrained(place, subfolder="tokenizer")
        except OSError:
            return AutoTokenizer.from_pretrained(place)

    tokenizer = _loaded(load, f"the tokenizer {name}")
    limit = tokenizer.model_max_length
    return TextTokenizer(name, limit if limit < _ENDLESS else CLIP_LIMIT, tokenizer)


def _loaded(load: Callable[[], T], what: str) -> T:
    try:
        return load()
    except Exception as error:  # json, safetensors, tokenizers and transformers have types of their own
        raise UserError(
            f"cannot load {what}",
            why=f"{type(error).__name__}: {_line(error)}",
            fix="give the folder that save_pretrained wrote, or a hub id that can be reached from here",
        ) from error


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
