"""The published models with random weights, at full size on any device, in the package's own code.

The family (noise schedule, conditioning, latent scaling) is loaded from a written miniature, whose configs
differ in widths only, and is given a UNet of full size; latents and text come from a cache of noise. So
nothing is downloaded, and no gigabytes are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from counting import Flops, forward_flops
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from samples import synthetic_cache
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from diffpref.config import ModelConfig, TrainConfig
from diffpref.config.loading import parse_train_config
from diffpref.data.cached import EncodedPairs
from diffpref.families import load_family
from diffpref.families.architectures import ARCHITECTURES
from diffpref.families.base import Conditioning
from diffpref.families.miniature import write_miniature
from diffpref.objectives import OBJECTIVES
from diffpref.training.policy import prepare_unet
from diffpref.training.setup import make_launch
from diffpref.training.stepper import Stepper
from diffpref.training.stop import StopRequest

for library in (diffusers_logging, transformers_logging):
    library.set_verbosity_error()  # they comment on casting to half precision
    library.disable_progress_bar()

TOKENS = 77
MINIATURE_SIDE = 64


class Published:
    """An architecture of `ARCHITECTURES`: its parts, made anew at every call on `device`."""

    def __init__(self, name: str, full_size: bool, device: torch.device, work: Path) -> None:
        self.name, self.device, self._kind = name, device, ARCHITECTURES[name]
        self._small: dict[str, dict[str, Any]] = {} if full_size else self._kind.small
        self.side = self._kind.resolution if full_size else MINIATURE_SIDE
        self.folder = write_miniature(work / name, name)
        self.family = load_family(ModelConfig(base=str(self.folder)))
        self.family.release_text()
        self.family.codec.release()
        self.latent = (4, self.side // 8, self.side // 8)

    def unet(self, device: torch.device | None = None) -> UNet2DConditionModel:
        with device or self.device:
            return UNet2DConditionModel(**(self._kind.unet | self._small.get("unet", {})))

    def vae(self, device: torch.device | None = None) -> AutoencoderKL:
        with device or self.device:
            vae = AutoencoderKL(**(self._kind.vae | self._small.get("vae", {})))
        return vae.requires_grad_(False).eval()

    def texts(self, device: torch.device | None = None) -> list[Any]:
        found = []
        for number, config in enumerate(self._text_configs()):
            cls = CLIPTextModelWithProjection if number else CLIPTextModel
            with device or self.device:
                found.append(cls(CLIPTextConfig(**config)).requires_grad_(False).eval())
        return found

    def embed(self, texts: list[Any], tokens: torch.Tensor) -> Conditioning:
        """What `texts` make of token numbers [B, 77], as the family conditions its UNet on it."""
        if len(texts) == 1:
            return {"prompt_embeds": texts[0](tokens)[0]}
        outputs = [text(tokens, output_hidden_states=True) for text in texts]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"prompt_embeds": hidden, "pooled_embeds": outputs[-1][0]}

    def sizes(self, images: int) -> Conditioning:
        whole = torch.full((images, 2), self.side)
        found = self.family.size_conditioning(whole, torch.zeros_like(whole), whole)
        return {name: value.to(self.device) for name, value in found.items()}

    def cache(self, folder: Path, pairs: int) -> EncodedPairs:
        configs = self._text_configs()
        shapes: dict[str, tuple[int, ...]] = {
            "prompt_embeds": (TOKENS, sum(config["hidden_size"] for config in configs))
        }
        if len(configs) > 1:
            shapes["pooled_embeds"] = (configs[-1]["projection_dim"],)
        return synthetic_cache(folder, pairs, self.side, self.latent, shapes)

    def flops(self) -> Flops:
        """Counted on networks without weights."""
        meta = torch.device("meta")
        unet, vae, texts = self.unet(meta), self.vae(meta), self.texts(meta)
        tokens = torch.zeros(1, TOKENS, dtype=torch.long, device=meta)
        with torch.no_grad():
            conditioning = {**self.embed(texts, tokens), **self.sizes(1)}
        conditioning = {name: value.to(meta) for name, value in conditioning.items()}
        latent = torch.zeros(1, *self.latent, device=meta)
        return Flops(
            unet=forward_flops(lambda: self.family.predict(unet, latent, tokens[:, 0], conditioning)),
            vae=forward_flops(lambda: vae.encode(torch.zeros(1, 3, self.side, self.side, device=meta))),
            text=forward_flops(lambda: self.embed(texts, tokens)),
        )

    def stepper(self, switches: Mapping[str, Any], cache: EncodedPairs, work: Path) -> Stepper:
        """diffpref's own training step on a new UNet. switches: dotted keys of the training config."""
        config = self.config(switches)
        launch = make_launch(config)
        self.family.unet = self.unet()
        prepare_unet(self.family.unet, config)
        objective = OBJECTIVES[config.objective.name](**config.objective.params)
        stepper = Stepper(
            config, launch.accelerator, self.family, objective, cache, launch.strategy, StopRequest()
        )
        del self.family.unet  # the stepper has it; nothing else should keep it in memory
        stepper.start({}, work / "cache", None)
        return stepper

    def config(self, switches: Mapping[str, Any]) -> TrainConfig:
        return config_of(str(self.folder), self.side, switches)

    def _text_configs(self) -> list[dict[str, Any]]:
        return [config | self._small.get("text", {}) for config in self._kind.texts]


def config_of(base: str, side: int, switches: Mapping[str, Any]) -> TrainConfig:
    """Of a training on noise; DPO, unless `switches` name another objective."""
    tree = {
        "model": {"base": base},
        "data": {"pairs": "noise", "resolution": side},
        "objective": {"name": switches.get("objective.name", "dpo")},
        "train": {"steps": 64, "learning_rate": 1e-8},
        "log": {"tensorboard": False},
    }
    return parse_train_config(tree, switches, source="bench")
