"""The result of a run: RUN/model, complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffpref.config import TrainConfig
from diffpref.data.disk import sync_file, told_when_disk_is_full
from diffpref.families.base import Family
from diffpref.paths import new_file_mode, sync_folder
from diffpref.reporting.model_card import write_model_card

ABOUT = "diffpref.json"


def exported_step(run: Path) -> int:
    """Optimizer steps that went into RUN/model; 0 when there is none."""
    try:
        return int(json.loads((run / "model" / ABOUT).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, OverflowError):
        return 0


def export_model(
    run: Path,
    config: TrainConfig,
    family: Family,
    unet: nn.Module,
    step: int,
    origin: Mapping[str, str],
    summary: Mapping[str, Any],
) -> Path:
    """Write RUN/model: a diffusers pipeline folder, or a LoRA with the name of its base; a model card in
    both.

    step: at which the run ended. origin: `ModelFiles.origin` of the base, recorded with the hashes of its
    weights, so that a LoRA is drawn on that base alone. Staged beside and renamed, so RUN/model never holds
    half a model. Raises UserError when the disk is full.
    """
    target, staged = run / "model", run / ".model.staged"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        with told_when_disk_is_full(f"the model {target}", "the last checkpoint is intact"):
            staged.mkdir(parents=True)
            if config.adapter.type == "none":
                family.save(unet, staged)
            else:
                family.save_lora(unet, staged)
            about = {
                **origin, "fingerprint": family.fingerprint(), "adapter": config.adapter.type, "step": step,
            }  # fmt: skip
            (staged / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            write_model_card(staged, config, dict(summary))
            for path in staged.rglob("*"):
                if path.is_file():
                    os.chmod(path, new_file_mode())
                    sync_file(path)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    sync_folder(run)
    return target
