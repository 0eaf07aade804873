"""Captions by any image-text-to-text model of transformers: LLaVA, Qwen-VL, BLIP, Florence-2 and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffpref.captions import options
from diffpref.captions.base import Captioned, Provenance
from diffpref.config.schema import option

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class TransformersCaptioner:
    """A vision-language model in this process."""

    model: str = option(
        help="folder or hub id of an image-text-to-text model, such as llava-hf/llava-1.5-7b-hf"
    )
    revision: str = options.revision_option()
    template: str = option("", help="file with the instruction ({prompt}, {tokens}); empty: the model's own")
    max_tokens: int = option(
        60,
        bounds="[1, inf)",
        help="length asked for, in tokens of the text encoder that will read the caption",
    )
    max_new_tokens: int = options.new_tokens_option(128)
    temperature: float = options.temperature_option(0.0)
    top_p: float = options.top_p_option(1.0)
    batch_size: int = options.batch_size_option()
    device: str = options.device_option()
    dtype: str = options.dtype_option()
    seed: int = options.seed_option()

    def __post_init__(self) -> None:
        options.require_valid(self, "captioner")
        options.require_sampling(self.temperature, self.top_p, "captioner")

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], rows: Sequence[int]
    ) -> list[Captioned]:
        raise NotImplementedError

    def provenance(self) -> Provenance:
        raise NotImplementedError
