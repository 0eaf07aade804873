"""Tensor files written so that they are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffpref.data.disk import sync_file
from diffpref.paths import new_file_mode, sync_folder


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file beside `path`, flush it to the disk, rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.tmp")
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            staged,
            metadata=metadata,
        )
        os.chmod(staged, new_file_mode())
        order_metadata(staged)
        sync_file(staged)
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def order_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, whose order differs between processes: equal contents are
    equal bytes."""
    with open(path, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        if len(header.get("__metadata__", {})) > 1:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) <= size:
                stream.seek(8)
                stream.write(text.ljust(size))


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
