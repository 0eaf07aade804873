"""Weights of evaluators: found by path or hub id, read without running code, converted once to safetensors."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpref.errors import UserError
from diffpref.families.loading import one_line
from diffpref.paths import resolve_or_hub_id, sha256_file


def locate(spec: str, names: Sequence[str], what: str) -> Path:
    """The file that holds weights: `spec` itself, or one of `names` in the folder or hub repository `spec`.

    Raises:
        UserError: not there, or the hub cannot be asked; `what` names the evaluator.
    """
    place = resolve_or_hub_id(spec, f"weights of {what}")
    if isinstance(place, str):
        return from_hub(place, names[0], what)
    if place.is_file():
        return place
    for name in names:
        if (place / name).is_file():
            return place / name
    raise UserError(f"{place} holds no weights of {what}", why=f"looked for {', '.join(names)}")


def from_hub(repository: str, name: str, what: str) -> Path:
    """A file of a hub repository, downloaded unless it is in the hub's cache. Raises UserError."""
    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} of {what} cannot be had from the hub ({repository})",
            why=one_line(error),
            fix=f"get it once where there is a network (`hf download {repository} {name}`), "
            "or name a local file or folder as the evaluator's weights",
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a checkpoint by name, and the SHA-256 of its file.

    A pickled checkpoint (.pt, .pth, .bin) is read with ``weights_only=True``, which refuses anything but
    tensors and plain containers, and kept as safetensors in diffpref's cache folder under its SHA-256; later
    reads take that copy. The file itself is never touched. A state dict inside a training checkpoint (key
    ``state_dict``) is found.

    Raises:
        UserError: damaged, or not a checkpoint of tensors.
    """
    digest = sha256_file(path)
    if path.suffix == ".safetensors":
        return _safetensors(path), digest
    converted = cache_folder() / f"{digest}.safetensors"
    if converted.is_file():
        with contextlib.suppress(UserError):  # a damaged copy is made again
            return _safetensors(converted), digest
    tensors = _pickled(path)
    with contextlib.suppress(OSError):  # without room for a copy the next run reads the original again
        _keep(tensors, converted)
    return tensors, digest


def cache_folder() -> Path:
    """Where converted weights are kept: ``diffpref/weights`` in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffpref" / "weights"


def check_names(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path | str, what: str
) -> None:
    """Raise UserError unless `given` has exactly the names and shapes of `wanted`; it names the differences."""
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    shapes = [
        f"{name} is {list(given[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    found = [("missing", missing), ("unknown", unknown), ("of another shape", shapes)]
    why = "; ".join(f"{title}: {_some(names)}" for title, names in found if names)
    if why:
        raise UserError(f"{path} is not a checkpoint of {what}", why=why)


def _some(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read", why=one_line(error)) from error


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = "it is damaged, or holds more than tensors, which is not loaded since it could run code"
        raise UserError(f"{path} is refused", why=why) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read", why=one_line(error)) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(f"{path} is not a checkpoint", why="it is not a table of tensors by name")
    return loaded


def _keep(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file({name: value.clone().contiguous() for name, value in tensors.items()}, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
