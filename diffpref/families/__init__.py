"""Model families, by the pipeline class that a model's own model_index.json names."""

from __future__ import annotations

from collections.abc import Callable

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffpref.config import ModelConfig
from diffpref.errors import UserError
from diffpref.families.base import Conditioning, Family
from diffpref.families.loading import model_folder, read_index
from diffpref.families.sd import StableDiffusion

FAMILIES: dict[str, Callable[..., Family]] = {"StableDiffusionPipeline": StableDiffusion}

__all__ = ["FAMILIES", "Conditioning", "Family", "load_family"]


def load_family(config: ModelConfig) -> Family:
    """Load the model that `config.base` names, all weights as fp32 on the CPU.

    Raises UserError: nothing there, not a pipeline folder, a pipeline class that is not in FAMILIES, a
    damaged part.
    """
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # a bar per weight file would tear our own
    folder = model_folder(config)
    index = read_index(folder)
    kind = index["_class_name"]
    if kind not in FAMILIES:
        raise UserError(
            f"{folder} is a {kind}, which diffpref cannot train",
            why=f"known pipeline classes: {', '.join(sorted(FAMILIES))}",
            fix="give a model of one of these classes",
        )
    return FAMILIES[kind](folder, index, config)
