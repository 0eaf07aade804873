"""Loading a diffusers pipeline for sampling: a folder, a run, a LoRA written by diffpref, or a hub id."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from diffpref.config import ModelConfig
from diffpref.errors import UserError
from diffpref.families import FAMILIES
from diffpref.families.loading import (
    INDEX,
    check_parts,
    load_pipeline_folder,
    model_folder,
    one_line,
    read_index,
)
from diffpref.paths import resolve, resolve_existing, resolve_or_hub_id
from diffpref.processes import choose_device
from diffpref.suites import name_hint

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LORA_INFO = "diffpref.json"
_UNUSED = ("safety_checker",)
_DOWN = re.compile(r"(lora_down|lora_A|lora\.down|lora_linear_layer\.down)\b")
log = logging.getLogger("diffpref")

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
    model: str | ModelConfig,
    *,
    lora: str | None = None,
    device: str | None = None,
    dtype: str = "fp32",
    scheduler: str = "ddim",
) -> LoadedPipeline:
    """Load a model, LoRA and scheduler; safety checker and progress bar are off.

    model: a name, or with a revision or variant as `ModelConfig`. A LoRA of diffpref train brings its own,
    and is loaded on no other base than the one it was trained on.

    Raises:
        UserError: nothing there, no diffusers model, a LoRA that does not fit, or whose base has changed, no
            such device or precision.
    """
    if dtype not in DTYPES:
        raise UserError(f"there is no precision {dtype!r}", fix=name_hint(dtype, DTYPES))
    target = choose_device(device)
    wanted = ModelConfig(base=model) if isinstance(model, str) else model
    base, own_lora = base_and_lora(wanted)
    if lora and own_lora:
        raise UserError(
            "two LoRAs were given",
            why=f"{wanted.base} is a LoRA itself, and --lora is {lora}",
            fix=f"give --model {base.base} and one --lora",
        )
    weights = own_lora or (resolve_existing(lora, "LoRA") if lora else None)
    trained_on = _fingerprint_of_base(weights) if weights else {}
    pipeline = _load_base(base, torch.float32 if trained_on else DTYPES[dtype])
    if weights is not None:
        _check_base(pipeline, weights, trained_on, base.base, strict=own_lora is not None)
        _load_lora(pipeline, weights)
    with _quiet():
        pipeline.to(DTYPES[dtype])
    pipeline.scheduler = build_scheduler(scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    fingerprint = weights_fingerprint(pipeline)
    pipeline.to(target)
    run = _run_of(weights) or _run_of(resolve(base.base))
    return LoadedPipeline(pipeline, wanted.base, lora, run, fingerprint, dtype, target)


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


def base_and_lora(model: ModelConfig) -> tuple[ModelConfig, Path | None]:
    """The pipeline that a model is or builds on, and its folder when it is a LoRA of ours.

    Raises UserError when it is neither, or a revision or variant is given with a LoRA, which has its own.
    """
    place = resolve_or_hub_id(model.base, "model")
    if isinstance(place, str):
        return model, None
    if not (place / INDEX).is_file() and (place / "model").is_dir():
        place = place / "model"  # a run folder
    if (place / INDEX).is_file():
        if model.revision:
            raise UserError(
                f"{model.base} is a folder, which has no revision {model.revision!r}",
                fix="leave --revision out, or give a hub id",
            )
        return replace(model, base=str(place)), None
    if not (place / LORA_WEIGHTS).is_file():
        raise UserError(
            f"{model.base} is not a model",
            why=f"it holds neither {INDEX} nor {LORA_WEIGHTS}",
            fix="give a diffusers folder, a run folder of diffpref train, or a hub id",
        )
    if model.revision or model.variant:
        raise UserError(
            f"{model.base} is a LoRA, which says itself what it belongs to",
            why="a revision or variant was given with it",
            fix=f"leave it out, or give --model BASE --lora {place} to draw it on another base",
        )
    return _base_of(place), place


def check_model(model: ModelConfig) -> None:
    """Raise UserError when a model is not to be had or lacks a part. A hub id is fetched."""
    base, lora = base_and_lora(model)
    folder = model_folder(base, _UNUSED)
    parts = [name for name, entry in read_index(folder).items() if isinstance(entry, list) and any(entry)]
    check_parts(folder, [part for part in parts if part not in _UNUSED])
    if lora is not None and not (lora / LORA_WEIGHTS).stat().st_size:
        raise UserError(f"the LoRA {lora} is empty", fix="export it again")


def versioned(model: str, revision: str, variant: str) -> ModelConfig:
    """`model` with what of revision and variant can be meant for it: a LoRA of ours brings its own, a folder
    has no revisions."""
    plain = ModelConfig(base=model)
    if base_and_lora(plain)[1]:
        return plain
    return replace(plain, revision=revision if isinstance(resolve(model), str) else "", variant=variant)


def recorded_base(model: str) -> ModelConfig:
    """What a model of diffpref train was trained from. Raises UserError when its folder does not say it."""
    place = resolve_or_hub_id(model, "model")
    for folder in (place / "model", place) if isinstance(place, Path) else ():
        base = _recorded(folder)
        if base is not None:
            return base
    raise UserError(
        f"{model} does not say what it was trained from", why=f"it has no {LORA_INFO}", fix="give --reference"
    )


def check_recorded_base(model: str, found: Mapping[str, str]) -> None:
    """Raise UserError unless the base that `recorded_base` names still has the weights that `model` was
    trained from. found: its `Family.fingerprint`."""
    place = resolve(model)
    folders = (place / "model", place) if isinstance(place, Path) else ()
    trained_on = next(filter(None, map(_fingerprint_of_base, folders)), {})
    other = [name for name in ("text", "unet") if trained_on and trained_on.get(name) != found[name]]
    if other:
        raise UserError(
            f"what {model} was trained from has changed since",
            why=f"other weights now: {', '.join(other)}",
            fix="restore it, or give --reference",
        )


def _record(folder: Path) -> dict[str, Any]:
    """What `training.export` wrote beside a model's weights; empty where there is nothing to read."""
    try:
        found = json.loads((folder / LORA_INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _recorded(folder: Path) -> ModelConfig | None:
    record = _record(folder)
    base, commit, revision, variant = (record.get(k) or "" for k in ("base", "commit", "revision", "variant"))
    if not (isinstance(base, str) and base):
        return None
    return ModelConfig(base=base, revision=str(commit or revision), variant=str(variant))


def _base_of(lora: Path) -> ModelConfig:
    base = _recorded(lora)
    if base is None:
        raise UserError(
            f"{lora} is a LoRA that does not say what it belongs to",
            why=f'{LORA_INFO} with a "base" is missing beside its weights',
            fix=f"give --model BASE --lora {lora}",
        )
    located, nested = base_and_lora(base)
    if nested is not None:
        raise UserError(f"the base of {lora} is a LoRA itself", why=f"base: {base.base}")
    return located


def _fingerprint_of_base(lora: Path) -> dict[str, str]:
    """Hashes of the weights that a LoRA was trained on; empty for those of other programs."""
    found = _record(lora if lora.is_dir() else lora.parent).get("fingerprint")
    return found if isinstance(found, dict) else {}


def _check_base(pipeline: Any, lora: Path, trained_on: dict[str, str], base: str, strict: bool) -> None:
    """Raise UserError when `pipeline` is not what the LoRA was trained on; where the user named the base
    himself, warn."""
    family = FAMILIES.get(type(pipeline).__name__)
    if not trained_on or family is None:
        if strict:
            log.warning("%s does not say which weights it was trained on: %s is taken as it is", lora, base)
        return
    names = {"text": "text encoder", "unet": "UNet"}
    found = family.fingerprint_of(pipeline)
    other = " and ".join(names[key] for key in sorted(names) if trained_on.get(key) != found[key])
    if not other:
        return
    if not strict:
        log.warning("%s was trained on another base than %s: another %s", lora, base, other)
        return
    raise UserError(
        f"{base} is not the model that the LoRA {lora} was trained on",
        why=f"its {other} has other weights than at training",
        fix=f"restore it, or give --model {base} --lora {lora} to draw it on what is there now",
    )


def _load_base(base: ModelConfig, dtype: torch.dtype) -> Any:
    folder = model_folder(base, _UNUSED)
    # the checker replaces images by black squares, which no score should see
    off = {"safety_checker": None, "requires_safety_checker": False}
    with _quiet():
        given = off if "safety_checker" in read_index(folder) else {}
        return load_pipeline_folder(folder, dtype, base.variant, **given)


def _load_lora(pipeline: Any, weights: Path) -> None:
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"a {type(pipeline).__name__} takes no LoRA")
    folder, name = (weights.parent, weights.name) if weights.is_file() else (weights, LORA_WEIGHTS)
    if not (folder / name).is_file():
        raise UserError(f"{weights} holds no LoRA", why=f"{name} is missing")
    try:
        with _quiet():
            pipeline.load_lora_weights(str(folder), weight_name=name)
    except Exception as error:  # peft, safetensors and diffusers each have types of their own
        raise UserError(f"the LoRA {weights} does not fit the model", why=one_line(error)) from error
    fitting, all_modules = _loaded_modules(pipeline), _modules_in(folder / name)
    if not fitting:
        raise UserError(
            f"the LoRA {weights} does not fit the model", why="none of its keys belong to this model"
        )
    if fitting < all_modules:
        share = 100 * fitting / all_modules
        log.warning(
            "%d of %d modules of the LoRA %s fit the model (%.0f %%): the others do nothing",
            fitting, all_modules, weights, share,
        )  # fmt: skip


def _modules_in(file: Path) -> int:
    """How many modules a LoRA file changes, in the names of diffusers, peft or kohya."""
    with safe_open(file, "pt") as opened:
        return sum(bool(_DOWN.search(name)) for name in opened.keys())  # noqa: SIM118  it is no mapping


def _loaded_modules(pipeline: Any) -> int:
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    layers = (module for network in networks for module in network.modules())
    return sum(bool(getattr(layer, "lora_A", None)) for layer in layers)


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
