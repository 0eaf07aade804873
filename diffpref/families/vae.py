"""The VAE of a latent diffusion model: images to the posterior of their latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffpref.config import ModelConfig
from diffpref.errors import UserError
from diffpref.families.loading import load_network
from diffpref.paths import resolve_or_hub_id

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LatentCodec:
    """An AutoencoderKL with fp32 weights, loaded when it is used and released when it is not.

    model.vae puts another VAE of the same latents in place of the model's own; model.vae_precision is the
    autocast precision of encoding. Raises UserError when the other VAE makes other latents.
    """

    def __init__(self, folder: Path, config: ModelConfig, own: Callable[[], AutoencoderKL]) -> None:
        """own: loads the VAE of the model in `folder`."""
        self._load = (lambda: _load_other(config.vae)) if config.vae else own
        self.precision = PRECISIONS[config.vae_precision]
        self._device = torch.device("cpu")
        self._module: AutoencoderKL | None = None
        self._shift: Tensor | None = None
        self.config: Any = self.module.config
        if config.vae:
            _check_same_latents(config.vae, self.config, AutoencoderKL.load_config(folder, subfolder="vae"))

    @property
    def module(self) -> AutoencoderKL:
        if self._module is None:
            self._module = self._load().requires_grad_(False).eval().to(self._device)
        return self._module

    def check_finite(self, mean: Tensor) -> None:
        """Raise UserError when encoding overflowed."""
        if not torch.isfinite(mean).all():
            raise UserError(
                "the VAE gives latents that are not finite",
                why=f"it overflows in {self.precision}, or its weights are damaged",
                fix='set model.vae_precision = "fp32", or name a VAE that is safe in half precision in '
                "model.vae",
            )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of `height` x `width` pixels."""
        return self.channels, height // self.factor, width // self.factor

    @property
    def channels(self) -> int:
        return int(self.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels per latent cell along a side (8 for Stable Diffusion)."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [-1, 1] -> posterior mean and log-variance, fp32 [B, C, H / factor, W / factor]."""
        pixels = pixels.to(self._device, torch.float32)
        with torch.autocast(self._device.type, self.precision, enabled=self.precision != torch.float32):
            posterior = self.module.encode(pixels).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    def scale(self, latents: Tensor) -> Tensor:
        """To the denoiser's units: times scaling_factor, after the shift of VAEs that have a mean and a
        deviation."""
        if not getattr(self.config, "latents_mean", None) or not getattr(self.config, "latents_std", None):
            return latents * self.config.scaling_factor
        if self._shift is None or self._shift.device != latents.device:  # kept there: sending it waits
            values = torch.tensor([self.config.latents_mean, self.config.latents_std])
            self._shift = values[:, None, :, None, None].to(latents.device)
        mean, std = self._shift
        return (latents - mean) * self.config.scaling_factor / std

    def to(self, device: torch.device) -> None:
        self._device = device
        if self._module is not None:
            self._module.to(device)

    def release(self) -> None:
        self._module = None


def _load_other(name: str) -> AutoencoderKL:
    place = resolve_or_hub_id(name, "VAE (model.vae)")
    whole = isinstance(place, Path) and not (place / "config.json").is_file() and (place / "vae").is_dir()
    vae: AutoencoderKL = load_network(AutoencoderKL, place, "vae" if whole else "")
    return vae


def _check_same_latents(name: str, other: Any, own: dict[str, Any]) -> None:
    facts = {
        "latent channels": (other.latent_channels, own.get("latent_channels", 4)),
        "scaling factor": (other.scaling_factor, own.get("scaling_factor", 0.18215)),
        "mean and deviation": (
            (other.get("latents_mean"), other.get("latents_std")),
            (own.get("latents_mean"), own.get("latents_std")),
        ),
        "halvings": (len(other.block_out_channels) - 1, len(own.get("block_out_channels", (64,))) - 1),
    }
    differing = [f"{what} {theirs}, not {ours}" for what, (theirs, ours) in facts.items() if theirs != ours]
    if differing:
        raise UserError(
            f"model.vae = {name!r} makes other latents than the model's own VAE",
            why="; ".join(differing),
            fix="give a VAE that was made for this model, such as a fine-tune of its own",
        )
