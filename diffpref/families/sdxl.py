"""Stable Diffusion XL: two text encoders, a pooled embedding, and the image's size and crop as conditioning.

arXiv 2307.01952, section 2.2: the UNet is told each image's original size, the top left corner of its crop
and the target size, so that small and cropped training images do not teach blur and missing heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffpref.config import ModelConfig
from diffpref.errors import UserError
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

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
TIME_IDS = 6  # original height and width, crop top and left, target height and width


class StableDiffusionXL:
    """An SDXL base pipeline taken apart for training. Implements `families.base.Family`.

    All weights are fp32, however they are stored. SDXL's own VAE overflows in fp16 even at inference.
    """

    name = "sdxl"

    def __init__(self, folder: Path, index: dict[str, Any], config: ModelConfig) -> None:
        """`folder`: a local pipeline folder; `index`: its model_index.json. Raises UserError when a part is
        unfit."""
        check_parts(folder, PARTS)
        self._folder, self._load = folder, PartLoader(folder, config.variant)
        self._device = torch.device("cpu")
        self._fingerprint: dict[str, str] = {}  # taken once, before the UNet is trained
        # What an unconditional image is at inference must be what dropped prompts train.
        self._zeros_for_empty = bool(index.get("force_zeros_for_empty_prompt", True))
        self.schedule = NoiseSchedule(folder, index["scheduler"][1])
        self.codec = LatentCodec(folder, config, self._load.vae)
        self._load_text()
        self.unet: UNet2DConditionModel = self._load(UNet2DConditionModel, "unet")
        check_unet(self._folder, self.unet, self.codec.channels, self._text_width)
        self._check_size_conditioning()

    def _load_text(self) -> None:
        self._texts: list[Any] = [
            self._load(CLIPTextModel, "text_encoder"),
            self._load(CLIPTextModelWithProjection, "text_encoder_2"),
        ]
        self._tokenizers: list[CLIPTokenizer] = [
            self._load.tokenizer(CLIPTokenizer, name) for name in ("tokenizer", "tokenizer_2")
        ]
        for text in self._texts:
            text.requires_grad_(False).eval()
            text.to(self._device)
        self.max_tokens = min(
            *(int(tokenizer.model_max_length) for tokenizer in self._tokenizers),
            *(int(text.config.max_position_embeddings) for text in self._texts),
        )
        self._text_width = sum(int(text.config.hidden_size) for text in self._texts)
        self._pooled_width = int(self._texts[1].config.projection_dim)

    def _check_size_conditioning(self) -> None:
        unet = self.unet.config
        wanted = TIME_IDS * (unet.addition_time_embed_dim or 0) + self._pooled_width
        if unet.addition_embed_type != "text_time" or unet.projection_class_embeddings_input_dim != wanted:
            raise UserError(
                f"the UNet of {self._folder} does not take SDXL base's size conditioning",
                why=f"it expects {unet.projection_class_embeddings_input_dim} values of kind "
                f"{unet.addition_embed_type!r}, six sizes and the pooled text make {wanted}",
                fix="align the base model; refiners and other variants are conditioned differently",
            )

    @property
    def text_encoders(self) -> list[Any]:
        if not self._texts:
            self._load_text()
        return self._texts

    @property
    def side_multiple(self) -> int:
        return side_multiple(self.unet.config, self.codec.factor)

    def to(self, device: torch.device) -> None:
        self._device = device
        self.codec.to(device)
        for text in self._texts:
            text.to(device)

    @torch.no_grad()
    def encode_prompts(self, captions: list[str]) -> Conditioning:
        """The penultimate hidden states of both encoders side by side, and the second one's projection."""
        hidden, pooled = [], torch.empty(0)
        for tokenizer, encoder in zip(self._tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(
                captions,
                padding="max_length",
                max_length=self.max_tokens,
                truncation=True,
                return_tensors="pt",
            )
            output = encoder(tokens.input_ids.to(self._device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = output[0]  # of the last encoder: its projected embedding
        embeds = torch.cat(hidden, dim=-1)
        if self._zeros_for_empty:
            shown = torch.tensor([caption != "" for caption in captions], device=self._device)
            embeds, pooled = embeds * shown[:, None, None], pooled * shown[:, None]
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def caption_tokens(self, captions: list[str]) -> list[int]:
        lengths = [
            [len(ids) for ids in tokenizer(captions, truncation=False, verbose=False).input_ids]
            for tokenizer in self._tokenizers
        ]
        return [max(pair) for pair in zip(*lengths, strict=True)]

    def size_conditioning(self, original: Tensor, crop: Tensor, target: Tensor) -> Conditioning:
        return {"time_ids": torch.cat([original, crop, target], dim=1).float()}

    def predict(
        self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        prediction: Tensor = unet(
            noisy,
            timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_embeds"],
                "time_ids": conditioning["time_ids"],
            },
            return_dict=False,
        )[0]
        return prediction

    def release_text(self) -> None:
        self._texts = []

    def pipeline(self, unet: nn.Module) -> StableDiffusionXLPipeline:
        first, second = self.text_encoders
        pipeline = StableDiffusionXLPipeline(
            vae=self.codec.module,
            text_encoder=first,
            text_encoder_2=second,
            tokenizer=self._tokenizers[0],
            tokenizer_2=self._tokenizers[1],
            unet=unet,
            scheduler=self.schedule.sampler(),
            force_zeros_for_empty_prompt=self._zeros_for_empty,
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save(self, unet: nn.Module, folder: Path) -> None:
        first, second = self.text_encoders
        pipeline = self._load.pipeline(unet=unet, text_encoder=first, text_encoder_2=second)
        pipeline.save_pretrained(folder, safe_serialization=True)

    def save_lora(self, unet: nn.Module, folder: Path, adapter: str = ADAPTER) -> None:
        save_lora(StableDiffusionXLPipeline, unet, folder, adapter)

    def fingerprint(self) -> dict[str, str]:
        if not self._fingerprint:
            self._fingerprint = {
                "vae": weights_hash([self.codec.module]),
                **_prints(self.text_encoders, self._tokenizers, self._zeros_for_empty, self.unet),
                "config": self.schedule.fingerprint(self.unet.config),
            }
        return self._fingerprint

    @staticmethod
    def fingerprint_of(pipeline: StableDiffusionXLPipeline) -> dict[str, str]:
        return _prints(
            [pipeline.text_encoder, pipeline.text_encoder_2],
            [pipeline.tokenizer, pipeline.tokenizer_2],
            bool(pipeline.config.force_zeros_for_empty_prompt),
            pipeline.unet,
        )


def _prints(
    texts: list[Any], tokenizers: list[CLIPTokenizer], zeros_for_empty: bool, unet: nn.Module
) -> dict[str, str]:
    rules = "".join(tokenizer_rules(tokenizer) for tokenizer in tokenizers)
    return {"text": weights_hash(texts, extra=f"{zeros_for_empty}{rules}"), "unet": weights_hash([unet])}
