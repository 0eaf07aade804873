"""Resumable state of a pretraining stage: safetensors and JSON, replaced in one rename."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{key}": torch.as_tensor(value).clone()
        for index, entry in state.items()
        for key, value in entry.items()
    }


def save_progress(
    folder: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    notes: dict[str, Any],
) -> None:
    """Writes modules, optimizer moments and the step to `folder`, whole or not at all."""
    tensors = _optimizer_tensors(optimizer)
    for name, module in modules.items():
        tensors |= {f"module.{name}.{key}": value.clone() for key, value in module.state_dict().items()}
    staged = folder.with_name(folder.name + ".staged")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    save_file(tensors, staged / "state.safetensors")
    (staged / "progress.json").write_text(json.dumps({"step": step, **notes}))
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # a kill may have left it
        os.replace(folder, old)
    os.replace(staged, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_progress(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restores what `save_progress` wrote; None when there is nothing yet."""
    old = folder.with_name(folder.name + ".old")
    source = folder if folder.exists() else old
    if not source.exists():
        return None
    tensors = load_file(source / "state.safetensors")
    for name, module in modules.items():
        prefix = f"module.{name}."
        module.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    notes: dict[str, Any] = json.loads((source / "progress.json").read_text())
    return notes
