"""Model families, by the pipeline class that a model's own model_index.json names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffpref.config import ModelConfig
from diffpref.errors import UserError
from diffpref.families.base import Conditioning, Family
from diffpref.families.loading import load_part, model_folder, read_index
from diffpref.families.sd import StableDiffusion
from diffpref.families.sdxl import StableDiffusionXL
from diffpref.paths import resolve

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
}

__all__ = ["FAMILIES", "Conditioning", "Family", "ModelFiles", "find_model", "load_family"]


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found and looked at, but not loaded. index: its model_index.json."""

    folder: Path
    index: dict[str, Any]
    config: ModelConfig

    def load(self) -> Family:
        """All weights as fp32 on the CPU. Raises UserError when a part is damaged or does not fit."""
        for library in (diffusers_logging, transformers_logging):
            library.disable_progress_bar()  # a bar per weight file would tear our own
        family: Any = FAMILIES[self.index["_class_name"]]  # a protocol says nothing of constructors
        # configs that no loader refuses fail in what is made of them
        return load_part(lambda: family(self.folder, self.index, self.config), f"the model {self.folder}")

    def origin(self) -> dict[str, str]:
        """What to load to have this model again: base, revision, variant, and the commit of a hub id."""
        config = self.config
        is_hub_id = isinstance(resolve(config.base), str)
        return {
            "base": config.base,
            "revision": config.revision if is_hub_id else "",
            "commit": self.folder.name if is_hub_id and self.folder.parent.name == "snapshots" else "",
            "variant": config.variant,
        }


def find_model(config: ModelConfig) -> ModelFiles:
    """Find the model that `config.base` names (a hub id is fetched) and check that it can be trained.

    Raises UserError: nothing there, not a pipeline folder, a pipeline class that is not in FAMILIES, another
    family than `config.family`.
    """
    folder = model_folder(config)
    index = read_index(folder)
    kind = index["_class_name"]
    if kind not in FAMILIES:
        raise UserError(
            f"{folder} is a {kind}, which diffpref cannot train",
            why=f"known pipeline classes: {', '.join(sorted(FAMILIES))}",
            fix="give a model of one of these classes",
        )
    if config.family not in ("auto", FAMILIES[kind].name):
        raise UserError(
            f'model.family is "{config.family}", but {folder} is a {kind}',
            why=f'that is "{FAMILIES[kind].name}": its text encoders, resolution and recipes differ',
            fix=f'use a recipe for it, give another model.base, or set family = "{FAMILIES[kind].name}"',
        )
    return ModelFiles(folder, index, config)


def load_family(config: ModelConfig) -> Family:
    """`find_model` and load it."""
    return find_model(config).load()
