"""What a model family offers to the rest of the package. One self-contained file per family implements it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffpref.families.lora import ADAPTER
from diffpref.families.schedule import NoiseSchedule
from diffpref.families.vae import LatentCodec

Conditioning = dict[str, Tensor]
"""What the denoiser is conditioned on, by name; each tensor has the batch as its first dimension."""


class Family(Protocol):
    """A text-to-image diffusion model: its parts, its noise schedule, and how it is read and written.

    B is a batch of images, C, h, w the latent's channels, height and width.
    """

    name: str  # "sd", "sdxl": the values of model.family
    unet: nn.Module  # the denoiser, fp32: the policy
    schedule: NoiseSchedule
    codec: LatentCodec
    max_tokens: int  # tokens a caption may have, begin and end markers included

    @property
    def side_multiple(self) -> int:
        """Height and width of training images must be multiples of this many pixels."""
        ...

    def to(self, device: torch.device) -> None:
        """Move the VAE and the text encoders (not the denoiser)."""
        ...

    def encode_prompts(self, captions: list[str]) -> Conditioning:
        """Text conditioning, fp32; captions beyond `max_tokens` are cut. "" is the empty prompt of
        guidance."""
        ...

    def caption_tokens(self, captions: list[str]) -> list[int]:
        """Number of tokens of each caption before any cut, markers included."""
        ...

    def size_conditioning(self, original: Tensor, crop: Tensor, target: Tensor) -> Conditioning:
        """What the denoiser is told of sizes; {} where it is told nothing. Each int64 [B, 2]: (height, width)
        before resizing, (top, left) of the crop in the resized image, (height, width) of the crop."""
        ...

    def predict(
        self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The prediction of `unet` (the policy, its wrapper, or a reference), [B, C, h, w]."""
        ...

    def release_text(self) -> None:
        """Free the text encoders; `pipeline` and `encode_prompts` load them again."""
        ...

    def pipeline(self, unet: nn.Module) -> Any:
        """A diffusers pipeline around `unet`, for sampling; no safety checker."""
        ...

    def save(self, unet: nn.Module, folder: Path) -> None:
        """Write a complete diffusers pipeline folder with `unet` in place of the base model's."""
        ...

    def save_lora(self, unet: nn.Module, folder: Path, adapter: str = ADAPTER) -> None:
        """Write the adapters as `load_lora_weights` reads them, rank, alpha and targets in the metadata."""
        ...

    @staticmethod
    def fingerprint_of(pipeline: Any) -> dict[str, str]:
        """`fingerprint`'s "text" and "unet" of a diffusers pipeline of the family, its weights fp32."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """sha256 of the values of the base model's "vae", "text" (tokenizer included) and
        "unet", and "config" of the settings of UNet and schedule."""
        ...
