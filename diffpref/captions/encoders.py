"""The models that a captions report may use: a text encoder's tokenizer, and CLIP. Loaded when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffpref.errors import UserError
from diffpref.paths import resolve_or_hub_id

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

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


@dataclass(frozen=True)
class Clip:
    """A CLIP model. Embeddings are float32 rows of length 1: their products are cosines."""

    name: str
    model: Any
    processor: Any

    def embed_images(self, images: Sequence[Image]) -> torch.Tensor:
        """[N, D] of RGB images."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        return self._unit(self.model.get_image_features, inputs)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[N, D] of texts, each cut at what the model reads."""
        limit = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": limit, "return_tensors": "pt"}
        return self._unit(
            self.model.get_text_features, self.processor(text=list(texts), **options).to(self.model.device)
        )

    def _unit(self, features: Callable[..., Any], inputs: Any) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            found = features(**inputs)
        # transformers 5 gives an object, version 4 the tensor itself
        vectors = getattr(found, "pooler_output", found).float().cpu()
        return torch.nn.functional.normalize(vectors, dim=-1)


def load_clip(name: str, device: str) -> Clip:
    """A CLIPModel and its processor from a folder or hub id, in fp32. Raises UserError when there is none."""
    import torch
    from transformers import CLIPModel, CLIPProcessor

    place = resolve_or_hub_id(name, "CLIP model")
    processor = _loaded(lambda: CLIPProcessor.from_pretrained(place), f"the processor of {name}")
    what = f"the CLIP model {name}"
    model: Any = _loaded(lambda: CLIPModel.from_pretrained(place, dtype=torch.float32), what)
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used", why=_line(error), fix="--device cpu") from error
    return Clip(name, model, processor)


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
