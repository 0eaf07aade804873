"""A model that has every shape and no weights: found by name, made of its configs alone, and run for free."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffpref.config import ModelConfig, TrainConfig
from diffpref.errors import UserError, nearest
from diffpref.families import FAMILIES, Family, ModelFiles, find_model
from diffpref.families.architectures import ARCHITECTURES, Architecture
from diffpref.families.loading import check_parts, check_unet, load_part, one_line, unet_skeleton
from diffpref.families.schedule import NoiseSchedule
from diffpref.objectives import OBJECTIVES
from diffpref.objectives.base import Objective
from diffpref.paths import resolve
from diffpref.training.batches import Batch
from diffpref.training.policy import check_targets, prepare_unet
from diffpref.training.precision import HALF, cast_frozen
from diffpref.training.reference import AdaptersOff, FrozenCopy, Measure, Reference
from diffpref.training.setup import check_model

PREFIX = "architecture:"
CONFIGS = ["model_index.json", "*/config.json", "*/scheduler_config.json"]


@dataclass(frozen=True)
class Skeleton:
    """What a training step needs of a run. Networks hold fake tensors: shapes and types, no memory.

    vae: the encoder of a run without a latent cache, else None.
    """

    config: TrainConfig
    kind: str  # class of the pipeline
    family: Family
    unet: Any
    reference: Reference | None
    vae: AutoencoderKL | None
    objective: Objective

    @property
    def networks(self) -> list[nn.Module]:
        """All that are on the device."""
        copied = self.reference.unet if isinstance(self.reference, FrozenCopy) else None
        return [network for network in (self.unet, copied, self.vae) if network is not None]

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]


def make_skeleton(config: TrainConfig, mode: FakeTensorMode) -> Skeleton:
    """The run of `config` with weights that belong to `mode`. Raises UserError for what `train` would refuse
    before it looks at weights or pairs: no such model, a LoRA target or a resolution that does not fit."""
    with _found(config.model) as files:
        check_parts(files.folder, ("unet", "vae", "scheduler"))
        vae = _vae_skeleton(files.folder)
        family = _family(files, vae)
    unet: Any = family.unet
    check_targets(unet, config.adapter)
    check_model(config, family)
    with torch.device("meta"):
        prepare_unet(unet, replace(config, model=replace(config.model, attention="sdpa")))
    half = HALF.get(config.train.mixed_precision)
    if half is not None:
        cast_frozen(unet, half)
    kind: Any = OBJECTIVES[config.objective.name]
    skeleton = Skeleton(
        config=config,
        kind=files.index["_class_name"],
        family=family,
        unet=unet,
        reference=_reference(config, unet) if kind.needs_reference else None,
        vae=None if config.data.cache_latents else vae,
        objective=kind(**config.objective.params),
    )
    with mode:  # and not before: torch's copies of fake tensors corrupt the interpreter
        for network in skeleton.networks:
            _fill_with_fakes(network)
    return skeleton


@contextlib.contextmanager
def _found(config: ModelConfig) -> Iterator[ModelFiles]:
    """`find_model`, which may hold configs only: those of a published architecture, or of a hub id."""
    if config.base.startswith(PREFIX):
        with tempfile.TemporaryDirectory() as folder:
            _write_configs(Path(folder), _architecture(config.base))
            yield find_model(replace(config, base=folder))
        return
    place = resolve(config.base)
    if isinstance(place, str) and place.count("/") == 1 and not place.startswith((".", "/", "~")):
        config = replace(config, base=str(_fetch_configs(place, config.revision)))
    yield find_model(config)


def _architecture(base: str) -> Architecture:
    name = base.removeprefix(PREFIX)
    if name not in ARCHITECTURES:
        close = nearest(name, ARCHITECTURES)
        raise UserError(
            f"model.base = {base!r}: there is no architecture of that name",
            why=f"known: {', '.join(PREFIX + known for known in ARCHITECTURES)}",
            fix=f"did you mean {PREFIX + close!r}?" if close else "",
        )
    return ARCHITECTURES[name]


def _write_configs(folder: Path, kind: Architecture) -> None:
    """The files of a pipeline folder that say what the model is made of."""
    parts: dict[str, dict[str, Any]] = {
        "unet/config.json": {"_class_name": "UNet2DConditionModel", **kind.unet},
        "vae/config.json": {"_class_name": "AutoencoderKL", **kind.vae},
        "scheduler/scheduler_config.json": {"_class_name": kind.sampler, **kind.schedule},
        "model_index.json": {"_class_name": kind.pipeline, "scheduler": ["diffusers", kind.sampler]},
    }
    for name, content in parts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def _fetch_configs(hub_id: str, revision: str) -> Path:
    """A few kB of a hub model, where `find_model` would fetch its weights."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=CONFIGS))
    except Exception as error:  # dozens of types; all mean that the model is not to be had
        names = ", ".join(PREFIX + name for name in ARCHITECTURES)
        raise UserError(
            f"model not found: {hub_id!r}",
            why=f"there is no such folder here, and the hub could not give its configs: {one_line(error)}",
            fix=f"without a network, estimate a model of the same kind with --model.base: {names}, "
            "or a local diffusers folder",
        ) from error


def _family(files: ModelFiles, vae: AutoencoderKL) -> Family:
    """The model's family without what its constructor loads: it predicts, but encodes and saves nothing."""
    kind: Any = FAMILIES[files.index["_class_name"]]
    family = kind.__new__(kind)
    family.schedule = NoiseSchedule(files.folder, files.index["scheduler"][1])
    family.unet = unet_skeleton(files.folder)
    halvings = len(vae.config.block_out_channels) - 1
    family.codec = SimpleNamespace(channels=vae.config.latent_channels, factor=2**halvings)
    check_unet(files.folder, family.unet, family.codec.channels, family.unet.config.cross_attention_dim)
    return family


class _CachedErrors:
    """Stands for `training.reference.CachedErrors`, which looks at the values."""

    def errors(self, batch: Batch, measure: Measure) -> tuple[Tensor, Tensor]:
        return torch.empty(len(batch.pairs)), torch.empty(len(batch.pairs))


def _reference(config: TrainConfig, unet: Any) -> Reference:
    """As `Stepper` chooses it."""
    kind = config.reference.kind
    if kind == "cached":
        return _CachedErrors()
    if kind == "adapter" or (kind == "auto" and config.adapter.type != "none"):
        return AdaptersOff(unet)
    return FrozenCopy(unet, HALF.get(config.train.mixed_precision))


def _vae_skeleton(folder: Path) -> AutoencoderKL:
    def build() -> AutoencoderKL:
        with torch.device("meta"):
            return AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))

    return load_part(build, f"the config of the vae of {folder}").requires_grad_(False).eval()


def _fill_with_fakes(network: nn.Module) -> None:
    """Put fake tensors of the CPU in place of those without a device: SDPA has no fused kernel on "meta", and
    its attention matrices would be counted. (`Module.to_empty` cannot: fake parameters do not move.)"""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device="cpu")
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
