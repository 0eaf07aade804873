"""Perturbed captions by an instruction-following language model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffpref.captions import options
from diffpref.captions.base import Level, Perturbed, Provenance
from diffpref.config.schema import option


@dataclass(frozen=True, kw_only=True)
class TransformersPerturber:
    """A chat model in this process, told to rewrite the caption."""

    level: Level = options.level_option()
    model: str = option(help="folder or hub id of an instruction-following model with a chat template")
    revision: str = options.revision_option()
    template: str = option(
        "",
        help="file with the instruction ({caption}, {level}); {level} in its name picks a file for each level; "
        "empty: the ones that ship with diffpref",
    )
    max_new_tokens: int = options.new_tokens_option(128)
    temperature: float = options.temperature_option(0.7)
    top_p: float = options.top_p_option(0.95)
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
