"""Finding a model and reading its parts, with a clear message for everything that can be wrong with a
folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from diffpref.config import ModelConfig
from diffpref.errors import UserError
from diffpref.paths import resolve, resolve_existing

INDEX = "model_index.json"
T = TypeVar("T")


def model_folder(config: ModelConfig) -> Path:
    """The local folder of `config.base`; a hub id is fetched (weights of the wanted variant only)."""
    place = resolve(config.base)
    if isinstance(place, str):
        looks_like_hub_id = place.count("/") == 1 and not place.startswith((".", "/", "~"))
        if not looks_like_hub_id:
            resolve_existing(config.base, "model folder")
        return _download(place, config)
    if not place.exists():
        resolve_existing(config.base, "model folder")
    return place


def _download(hub_id: str, config: ModelConfig) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(
            DiffusionPipeline.download(
                hub_id, revision=config.revision or None, variant=config.variant or None
            )
        )
    except Exception as error:  # dozens of types; all mean that the model is not to be had
        raise UserError(
            f"model not found: {hub_id!r}",
            why=f"there is no such folder here, and the hub could not give it: {one_line(error)}",
            fix="check the spelling, the network and your access to it, or give a local diffusers folder",
        ) from error


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a pipeline folder. Raises UserError when the folder is no pipeline."""
    path = folder / INDEX
    if not path.is_file():
        holds = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "it is a file"
        raise UserError(
            f"{folder} is not a diffusers pipeline folder",
            why=f"{INDEX} is missing; there is: {holds or 'nothing'}",
            fix="give a folder that save_pretrained wrote; convert single files with diffusers first",
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read", why=one_line(error), fix="fetch the model again") from error
    return dict(index)


def check_parts(folder: Path, parts: Iterable[str]) -> None:
    """Raise UserError when a part of the pipeline has no folder (before anything large is loaded)."""
    missing = [part for part in parts if not (folder / part).is_dir() or not any((folder / part).iterdir())]
    if missing:
        raise UserError(
            f"the model {folder} is incomplete",
            why=f"missing or empty: {', '.join(missing)}",
            fix="fetch the model again",
        )


def load_part(load: Callable[[], T], what: str) -> T:
    """Run a loader; whatever a damaged or missing file makes it raise becomes a UserError."""
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # safetensors, json, transformers and diffusers each have types of their own
        raise UserError(
            f"cannot load {what}",
            why=f"{type(error).__name__}: {one_line(error)}",
            fix="check the model folder (and model.variant), or fetch the model again",
        ) from error


def weights_hash(modules: Iterable[nn.Module], extra: str = "") -> str:
    """sha256 over names, shapes and values of all weights, the same for every file format and location.

    Values are hashed as loaded (fp32), so an fp16 file and its fp32 copy are the same model.
    """
    digest = hashlib.sha256(extra.encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
