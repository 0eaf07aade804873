"""Stable Diffusion 1.x and 2.x, and every model of the same parts: one CLIP text encoder, AutoencoderKL, a
UNet.

Everything that differs between them (epsilon or v-prediction, latent channels, VAE scaling, text width, noise
schedule) is read from the model's own config, never from its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffpref.config import ModelConfig
from diffpref.families.base import Conditioning
from diffpref.families.loading import (
    PartLoader,
    check_parts,
    check_unet,
    side_multiple,
    tokenizer_rules,
    weights_hash,
)
from diffpref.families.lora import ADAPTER, save_lora
from diffpref.families.schedule import NoiseSchedule
from diffpref.families.vae import LatentCodec

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class StableDiffusion:
    """A Stable Diffusion pipeline taken apart for training. Implements `families.base.Family`.

    All weights are fp32, however they are stored: the VAE overflows in fp16, the text encoder is run once,
    and the policy's master weights must not lose small updates.
    """

    name = "sd"

    def __init__(self, folder: Path, index: dict[str, Any], config: ModelConfig) -> None:
        """`folder`: a local pipeline folder; `index`: its model_index.json. Raises UserError when a part is
        unfit."""
        check_parts(folder, PARTS)
        self._folder, self._load = folder, PartLoader(folder, config.variant)
        self._device = torch.device("cpu")
        self._fingerprint: dict[str, str] = {}  # taken once, before the UNet is trained
        self.schedule = NoiseSchedule(folder, index["scheduler"][1])
        self.codec = LatentCodec(folder, config, self._load.vae)
        self._load_text()
        self.unet: UNet2DConditionModel = self._load(UNet2DConditionModel, "unet")
        check_unet(self._folder, self.unet, self.codec.channels, self._text_width)

    def _load_text(self) -> None:
        self._text: CLIPTextModel | None = self._load(CLIPTextModel, "text_encoder")
        self._tokenizer: CLIPTokenizer = self._load.tokenizer(CLIPTokenizer, "tokenizer")
        self._text.requires_grad_(False).eval()
        nn.Module.to(self._text, self._device)
        text = self._text.config
        self.max_tokens = min(int(self._tokenizer.model_max_length), int(text.max_position_embeddings))
        self._text_width = int(text.hidden_size)
        self._text_mask = bool(getattr(text, "use_attention_mask", False))

    @property
    def text_encoder(self) -> CLIPTextModel:
        if self._text is None:
            self._load_text()
        assert self._text is not None
        return self._text

    @property
    def side_multiple(self) -> int:
        return side_multiple(self.unet.config, self.codec.factor)

    def to(self, device: torch.device) -> None:
        self._device = device
        self.codec.to(device)
        if self._text is not None:
            nn.Module.to(self._text, device)

    @torch.no_grad()
    def encode_prompts(self, captions: list[str]) -> Conditioning:
        encoder = self.text_encoder
        tokens = self._tokenizer(
            captions, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).to(self._device)
        mask = tokens.attention_mask if self._text_mask else None
        return {"prompt_embeds": encoder(tokens.input_ids, attention_mask=mask)[0]}

    def caption_tokens(self, captions: list[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer(captions, truncation=False, verbose=False).input_ids]

    def size_conditioning(self, original: Tensor, crop: Tensor, target: Tensor) -> Conditioning:
        return {}

    def predict(
        self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        prediction: Tensor = unet(
            noisy, timesteps, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False
        )[0]
        return prediction

    def release_text(self) -> None:
        self._text = None

    def pipeline(self, unet: nn.Module) -> StableDiffusionPipeline:
        pipeline = StableDiffusionPipeline(
            vae=self.codec.module,
            text_encoder=self.text_encoder,
            tokenizer=self._tokenizer,
            unet=unet,
            scheduler=self.schedule.sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save(self, unet: nn.Module, folder: Path) -> None:
        pipeline = self._load.pipeline(unet=unet, text_encoder=self.text_encoder)
        pipeline.save_pretrained(folder, safe_serialization=True)

    def save_lora(self, unet: nn.Module, folder: Path, adapter: str = ADAPTER) -> None:
        save_lora(StableDiffusionPipeline, unet, folder, adapter)

    def fingerprint(self) -> dict[str, str]:
        if not self._fingerprint:
            self._fingerprint = {
                "vae": weights_hash([self.codec.module]),
                **_prints(self.text_encoder, self._tokenizer, self.unet),
                "config": self.schedule.fingerprint(self.unet.config),
            }
        return self._fingerprint

    @staticmethod
    def fingerprint_of(pipeline: StableDiffusionPipeline) -> dict[str, str]:
        return _prints(pipeline.text_encoder, pipeline.tokenizer, pipeline.unet)


def _prints(text: nn.Module, tokenizer: CLIPTokenizer, unet: nn.Module) -> dict[str, str]:
    return {"text": weights_hash([text], extra=tokenizer_rules(tokenizer)), "unet": weights_hash([unet])}
