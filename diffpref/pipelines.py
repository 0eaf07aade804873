"""Loading a diffusers pipeline for sampling: a folder, a run, a LoRA written by diffpref, or a hub id."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffpref.errors import UserError
from diffpref.paths import resolve, resolve_existing, resolve_or_hub_id
from diffpref.processes import choose_device
from diffpref.suites import name_hint

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LORA_INFO = "diffpref.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class LoadedPipeline:
    """A pipeline ready to sample, and what there is to say about it.

    ``model`` and ``lora`` are as the user gave them, ``run`` is the training run they belong to, if any.
    """

    pipeline: Any
    model: str
    lora: str | None
    run: str | None
    fingerprint: str
    dtype: str
    device: str

    def count_truncated(self, texts: Iterable[str]) -> int:
        """How many texts are longer than the text encoder reads."""
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        if tokenizer is None:
            return 0
        lengths = [len(tokenizer(text, truncation=False).input_ids) for text in texts]
        return sum(length > tokenizer.model_max_length for length in lengths)


def load_pipeline(
    model: str,
    *,
    lora: str | None = None,
    device: str | None = None,
    dtype: str = "fp32",
    scheduler: str = "ddim",
) -> LoadedPipeline:
    """Load a model, LoRA and scheduler; safety checker and progress bar are off.

    Raises:
        UserError: nothing there, no diffusers model, a LoRA that does not fit, no such device or precision.
    """
    if dtype not in DTYPES:
        raise UserError(f"there is no precision {dtype!r}", fix=name_hint(dtype, DTYPES))
    target = choose_device(device)
    base, own_lora = _locate(model)
    if lora and own_lora:
        raise UserError(
            "two LoRAs were given",
            why=f"{model} is a LoRA itself, and --lora is {lora}",
            fix=f"give --model {base} and one --lora",
        )
    pipeline = _load_base(base, DTYPES[dtype])
    weights = own_lora or (resolve_existing(lora, "LoRA") if lora else None)
    if weights is not None:
        _load_lora(pipeline, weights)
    pipeline.scheduler = build_scheduler(scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    fingerprint = weights_fingerprint(pipeline)
    pipeline.to(target)
    run = _run_of(weights) or _run_of(resolve(base))
    return LoadedPipeline(pipeline, model, lora, run, fingerprint, dtype, target)


def build_scheduler(name: str, config: Any) -> Any:
    """A sampler of the model's own noise schedule. ``config`` is the config of the model's scheduler."""
    if name == "ddim":
        return DDIMScheduler.from_config(config)
    if name == "euler":
        return EulerDiscreteScheduler.from_config(config)
    if name == "dpmsolver++":
        return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
    if name == "pndm":
        # Without this a model that was saved with another scheduler would get three warm-up steps of four
        # evaluations each; Stable Diffusion's own config skips them.
        return PNDMScheduler.from_config(config, skip_prk_steps=True)
    raise UserError(
        f"there is no scheduler {name!r}", fix=name_hint(name, ["ddim", "euler", "dpmsolver++", "pndm"])
    )


def weights_fingerprint(pipeline: Any) -> str:
    """sha256 over every weight of every network (LoRA included), whatever file format they came from."""
    digest = hashlib.sha256()
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            for key, tensor in sorted(component.state_dict().items()):
                digest.update(f"{name}.{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def flush_to_disk(stream: IO[str]) -> None:
    """Make what was written so far survive a power cut."""
    stream.flush()
    os.fsync(stream.fileno())


def base_and_lora(model: str) -> tuple[str, Path | None]:
    """The pipeline folder or hub id that a model is or builds on, and its folder when it is a LoRA of ours.

    Raises UserError when it is neither.
    """
    return _locate(model)


def recorded_base(model: str) -> str:
    """What a model of diffpref train was trained from. Raises UserError when its folder does not say it."""
    place = resolve_or_hub_id(model, "model")
    for folder in (place / "model", place) if isinstance(place, Path) else ():
        try:
            return str(json.loads((folder / LORA_INFO).read_text(encoding="utf-8"))["base"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise UserError(
        f"{model} does not say what it was trained from", why=f"it has no {LORA_INFO}", fix="give --reference"
    )


def _locate(model: str) -> tuple[str, Path | None]:
    """The base to load (folder or hub id) and, when ``model`` is a LoRA of ours, its folder."""
    place = resolve_or_hub_id(model, "model")
    if isinstance(place, str):
        return place, None
    if not (place / "model_index.json").is_file() and (place / "model").is_dir():
        place = place / "model"  # a run folder
    if (place / "model_index.json").is_file():
        return str(place), None
    if (place / LORA_WEIGHTS).is_file():
        return _base_of(place), place
    raise UserError(
        f"{model} is not a model",
        why=f"it holds neither model_index.json nor {LORA_WEIGHTS}",
        fix="give a diffusers folder, a run folder of diffpref train, or a hub id",
    )


def _base_of(lora: Path) -> str:
    try:
        base = json.loads((lora / LORA_INFO).read_text(encoding="utf-8"))["base"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{lora} is a LoRA that does not say what it belongs to",
            why=f'{LORA_INFO} with a "base" is missing beside its weights',
            fix=f"give --model BASE --lora {lora}",
        ) from error
    located, nested = _locate(str(base))
    if nested is not None:
        raise UserError(f"the base of {lora} is a LoRA itself", why=f"base: {base}")
    return located


def _load_base(base: str, dtype: torch.dtype) -> Any:
    try:
        index = DiffusionPipeline.load_config(base)
        # the checker would be downloaded, and replaces images by black squares, which no score should see
        off = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
        with _quiet():
            return DiffusionPipeline.from_pretrained(base, dtype=dtype, **off)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"cannot load the model {base}",
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix="check the folder, or the hub id and the network",
        ) from error


def _load_lora(pipeline: Any, weights: Path) -> None:
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"a {type(pipeline).__name__} takes no LoRA")
    folder, name = (weights.parent, weights.name) if weights.is_file() else (weights, LORA_WEIGHTS)
    if not (folder / name).is_file():
        raise UserError(f"{weights} holds no LoRA", why=f"{name} is missing")
    try:
        with _quiet():
            pipeline.load_lora_weights(str(folder), weight_name=name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"the LoRA {weights} does not fit the model", why=str(error).strip().splitlines()[0]
        ) from error
    if not pipeline.get_active_adapters():
        raise UserError(
            f"the LoRA {weights} does not fit the model", why="none of its keys belong to this model"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the loaders' bars and remarks off the screen: ours says what the user waits for."""
    levels = (diffusers_logging.get_verbosity(), transformers_logging.get_verbosity())
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


def _run_of(place: Path | str | None) -> str | None:
    """The training run that a model folder belongs to: the folder above it, if it logged metrics."""
    if not isinstance(place, Path):
        place = Path(place) if place else None
    if place is None:
        return None
    folder = (place if place.is_dir() else place.parent).resolve().parent
    return str(folder) if (folder / "metrics.jsonl").is_file() else None
