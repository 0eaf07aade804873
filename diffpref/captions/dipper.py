"""Captions paraphrased by DIPPER (Krishna et al., arXiv 2303.13408), as DCPO does, or by another T5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffpref.captions import options
from diffpref.captions.base import Level, Perturbed, Provenance
from diffpref.config.schema import option

DIPPER = "kalpeshk2011/dipper-paraphraser-xxl"


@dataclass(frozen=True, kw_only=True)
class DipperPerturber:
    """A T5 paraphraser in this process."""

    level: Level = options.level_option()
    model: str = option(DIPPER, help="folder or hub id of a T5 paraphraser; DIPPER has 11B parameters")
    revision: str = options.revision_option()
    tokenizer: str = option(
        "", help="folder or hub id of its tokenizer; empty: the model's own, for DIPPER google/t5-v1_1-xxl"
    )
    template: str = option(
        "",
        help="file with the model's input ({caption}, {context}, {lexical}, {level}); empty: DIPPER's format",
    )
    sentences: int = option(
        3, bounds="[1, inf)", help="sentences paraphrased at a time; those before them are the context"
    )
    max_new_tokens: int = options.new_tokens_option(256)
    temperature: float = options.temperature_option(1.0)
    top_p: float = options.top_p_option(0.75)
    batch_size: int = options.batch_size_option()
    device: str = options.device_option()
    dtype: str = options.dtype_option()
    seed: int = options.seed_option()

    def __post_init__(self) -> None:
        options.require_valid(self, "perturber")
        options.require_sampling(self.temperature, self.top_p, "perturber")

    def __call__(self, captions: Sequence[str], rows: Sequence[int]) -> list[Perturbed]:
        raise NotImplementedError

    def provenance(self) -> Provenance:
        raise NotImplementedError
