"""Weights of evaluators: found in a folder, a file or on the hub, read without running anything, checked.

Files in pickle form (``.pt``, ``.pth``, ``.bin``) are read with ``weights_only=True``, which runs no code,
and converted once to safetensors in a cache folder of ours. Other formats than these two are refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffpref.errors import UserError
from diffpref.paths import new_file_mode, resolve, resolve_or_hub_id, sha256_file

logger = logging.getLogger(__name__)

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model", "module")  # where training scripts put the tensors
_SHOWN = 3  # keys named in a message

State = dict[str, torch.Tensor]


def cache_folder() -> Path:
    """Where converted weights lie: ``$DIFFPREF_CACHE``, or ``diffpref`` in the user's cache folder."""
    if chosen := os.environ.get("DIFFPREF_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffpref"


def find_file(weights: str, names: Iterable[str], repository: str, what: str) -> Path:
    """The checkpoint file that ``weights`` means.

    Args:
        weights: a file; a folder that holds one of ``names``; a hub id that does; "" for ``repository``.
        names: accepted file names, the preferred one first.
        repository: hub id of the published weights.
        what: names them in messages ("weights of hps-v2.1").

    Raises:
        UserError: nothing there, or the hub cannot give it (no network and not in the cache, say).
    """
    names = list(names)
    place = resolve_or_hub_id(weights or repository, what)
    if isinstance(place, str):
        return download(place, names, what)
    if place.is_file():
        return place
    for name in names:
        if (place / name).is_file():
            return place / name
    holds = ", ".join(sorted(entry.name for entry in place.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{what} not found in {place}",
        why=f"it holds {holds}",
        fix=f"expected is a file called {' or '.join(names)}; or give the path of the file itself",
    )


def download(repository: str, names: Iterable[str], what: str) -> Path:
    """The first of these files that a hub repository has, from the local cache or the network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    names = list(names)
    reason: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError as error:  # also what the offline cache raises: the next name may be there
            reason = error
        except Exception as error:  # dozens of types; all mean that the file is not to be had
            reason = error
            break
    raise UserError(
        f"{what} not found: {names[0]} of the hub repository {repository!r}",
        why=f"it is not in the local cache and the hub could not give it: {one_line(reason)}",
        fix="check the spelling and the network, fetch it where there is one "
        f"(hf download {repository} {names[0]}), or give a local file or folder as weights",
    ) from reason


def read_state(path: Path) -> State:
    """The tensors of a checkpoint file, by name.

    Raises:
        UserError: damaged, or not a checkpoint, or one that only code in it could open.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in PICKLES:
        raise UserError(
            f"{path} is no checkpoint that can be read",
            why=f"its name ends in {path.suffix!r}",
            fix=f"expected is a file of tensors ending in .safetensors, {', '.join(PICKLES)}",
        )
    digest = sha256_file(path)
    converted = cache_folder() / "weights" / f"{digest}.safetensors"
    if converted.is_file():
        return _read_safetensors(converted)
    state = _read_pickle(path)
    _keep(state, converted, {"source": path.name, "sha256": digest})
    return state


def load_state(module: nn.Module, state: Mapping[str, torch.Tensor], source: str, expected: str) -> None:
    """Load weights of exactly this module.

    Raises:
        UserError: names or shapes differ; it names the first ones and what was expected.
    """
    own = module.state_dict()
    whole = [
        name
        for name in own
        if name in state and own[name].is_floating_point() > state[name].is_floating_point()
    ]
    if whole:
        raise UserError(
            f"{source} does not hold {expected}",
            why=f"{whole[0]} is of {str(state[whole[0]].dtype).removeprefix('torch.')}, quantised perhaps",
            fix="give weights in fp32, bf16 or fp16",
        )
    check_keys(
        source,
        expected,
        missing=[name for name in own if name not in state],
        unexpected=[name for name in state if name not in own],
        shapes=[
            f"{name}: {list(state[name].shape)}, expected {list(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ],
    )
    module.load_state_dict({name: state[name] for name in own})


def check_keys(
    source: str, expected: str, missing: list[str], unexpected: list[str], shapes: list[str]
) -> None:
    """Raise UserError when a checkpoint lacks weights, holds others, or holds them in other shapes."""
    faults = [
        f"{label} {', '.join(sorted(names)[:_SHOWN])}{_more(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise UserError(
            f"{source} does not hold {expected}",
            why="; ".join(faults),
            fix="give the checkpoint that the evaluator was published with, or one of the same network",
        )


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all weights: the same for every file format and place."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def not_loaded(what: str, place: str, error: Exception) -> UserError:
    """Why a model of transformers cannot be had. place: folder or hub id."""
    return UserError(
        f"cannot load {what} {place}",
        why=f"{type(error).__name__}: {one_line(error)}",
        fix="check the folder, or fetch the model again"
        if is_local(place)
        else "check the spelling and the network, or fetch it where there is one and give its folder: "
        f"hf download {place}",
    )


def is_local(weights: str) -> bool:
    """Whether a path of this name exists."""
    return isinstance(resolve(weights), Path)


def _more(names: list[str]) -> str:
    return f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except Exception as error:  # safetensors has types of its own, the file system others
        raise _unreadable(path, error) from error


def _read_pickle(path: Path) -> State:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, EOFError, RuntimeError of zip files, KeyError, ...
        raise _unreadable(path, error) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {name: value for name, value in _items(content) if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(
            f"{path} holds no weights",
            why=f"it holds {type(content).__name__} without a tensor in it",
            fix="give a file of tensors by name (a state dict)",
        )
    if all(name.startswith("module.") for name in tensors):  # saved from a data-parallel wrapper
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


def _items(content: Any) -> Iterable[tuple[str, Any]]:
    return ((str(name), value) for name, value in content.items()) if isinstance(content, dict) else ()


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be read",
        why=f"{type(error).__name__}: {_reason(error)}",
        fix="it must be a plain file of tensors; fetch it again, or convert it to safetensors where you "
        "trust it: programs inside checkpoints are never run",
    )


def _reason(error: Exception) -> str:
    """torch's message without its advice to run what is inside, and without colours."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    return one_line(re.sub(r"\x1b\[[0-9;]*m", "", text).strip().split("\n\n")[0].split(". Please")[0])


def _keep(state: State, path: Path, metadata: dict[str, str]) -> None:
    """Write the converted weights; where that fails (a full disk) they are converted again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".convert-", suffix=".safetensors", dir=path.parent)
        os.close(descriptor)
        try:
            save_file(state, temporary, metadata)
            os.chmod(temporary, new_file_mode())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("converted weights are not kept in %s: %s", path.parent, error)
