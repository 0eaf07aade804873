"""What a model family offers to the rest of the package. One self-contained file per family implements it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Conditioning = dict[str, Tensor]
"""What the denoiser is conditioned on, by name; each tensor has the batch as its first dimension."""


class Family(Protocol):
    """A text-to-image diffusion model: its parts, its noise schedule, and how it is read and written.

    B is a batch of images, C, h, w the latent's channels, height and width.
    """

    name: str
    unet: nn.Module  # the denoiser, fp32: the policy
    prediction_type: str  # "epsilon", "v_prediction" or "sample", from the model's own config
    num_timesteps: int
    max_tokens: int  # tokens a caption may have, begin and end markers included

    def check_resolution(self, resolution: int) -> None:
        """Raise UserError when images of this side do not fit the networks."""
        ...

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a square image of `resolution` pixels."""
        ...

    def to(self, device: torch.device) -> None:
        """Move the VAE and the text encoders (not the denoiser)."""
        ...

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [-1, 1] -> posterior mean and log-variance, each fp32 [B, C, h, w], **not**
        scaled."""
        ...

    def scale_latents(self, latents: Tensor) -> Tensor:
        """From the VAE's units to the denoiser's: times the VAE's scaling factor."""
        ...

    def encode_prompts(self, captions: list[str]) -> Conditioning:
        """Text conditioning, fp32; captions beyond `max_tokens` are cut. "" is the empty prompt of
        guidance."""
        ...

    def caption_tokens(self, captions: list[str]) -> list[int]:
        """Number of tokens of each caption before any cut, markers included."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Forward process at integer timesteps [B]: sqrt(abar_t) latents + sqrt(1 - abar_t) noise."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, by `prediction_type`."""
        ...

    def predict(
        self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The prediction of `unet` (the policy, its wrapper, or a reference), [B, C, h, w]."""
        ...

    def release_encoders(self) -> None:
        """Free the VAE and the text encoders; `pipeline` and the encode functions load them again."""
        ...

    def pipeline(self, unet: nn.Module) -> Any:
        """A diffusers pipeline around `unet`, for sampling; no safety checker."""
        ...

    def save(self, unet: nn.Module, folder: Path) -> None:
        """Write a complete diffusers pipeline folder with `unet` in place of the base model's."""
        ...

    def save_lora(self, unet: nn.Module, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors`, rank, alpha and targets in its metadata."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """sha256 of the values of the base model's "vae", "text" (tokenizer included) and "unet"."""
        ...
