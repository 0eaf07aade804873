"""Stable Diffusion 1.x and 2.x, and every model of the same parts: one CLIP text encoder, AutoencoderKL, a
UNet.

Everything that differs between them (epsilon or v-prediction, latent channels, VAE scaling, text width, noise
schedule) is read from the model's own config, never from its name.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffpref.config import ModelConfig
from diffpref.errors import UserError
from diffpref.families.base import Conditioning
from diffpref.families.loading import check_parts, load_part, weights_hash

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class StableDiffusion:
    """A Stable Diffusion pipeline taken apart for training. Implements `families.base.Family`.

    All weights are fp32, however they are stored: the VAE overflows in fp16, the text encoder is run once,
    and the policy's master weights must not lose small updates.
    """

    name = "stable-diffusion"

    def __init__(self, folder: Path, index: dict[str, Any], config: ModelConfig) -> None:
        """`folder`: a local pipeline folder; `index`: its model_index.json. Raises UserError when a part is
        unfit."""
        check_parts(folder, PARTS)
        self._folder = folder
        self._variant = config.variant or None
        self._device = torch.device("cpu")
        self._fingerprint: dict[str, str] = {}  # taken once, before the UNet is trained
        self.scheduler = load_part(
            lambda: DDPMScheduler.from_pretrained(folder, subfolder="scheduler"), f"the scheduler of {folder}"
        )
        self._sampler_class = getattr(diffusers, index["scheduler"][1])
        self.prediction_type = str(self.scheduler.config.prediction_type)
        self.num_timesteps = int(self.scheduler.config.num_train_timesteps)
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"{folder} predicts {self.prediction_type!r}",
                why=f"known: {', '.join(PREDICTION_TYPES)}",
                fix="check prediction_type in scheduler/scheduler_config.json",
            )
        self._load_encoders()
        self.unet: UNet2DConditionModel = self._load(UNet2DConditionModel, "unet", dtype=torch.float32)
        self._check_fit()
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    def _load(self, kind: Any, part: str, **options: Any) -> Any:
        load = partial(kind.from_pretrained, self._folder, subfolder=part, **options)
        if self._variant and part not in ("tokenizer", "scheduler"):
            load = partial(load, variant=self._variant)
        return load_part(load, f"the {part} of {self._folder}")

    def _load_encoders(self) -> None:
        self._vae: AutoencoderKL | None = self._load(AutoencoderKL, "vae", dtype=torch.float32)
        self._text: CLIPTextModel | None = self._load(CLIPTextModel, "text_encoder", dtype=torch.float32)
        self._tokenizer: CLIPTokenizer = self._load(CLIPTokenizer, "tokenizer")
        for module in (self._vae, self._text):
            module.requires_grad_(False).eval()
            nn.Module.to(module, self._device)
        self._vae_config, text = self._vae.config, self._text.config
        self.max_tokens = min(int(self._tokenizer.model_max_length), int(text.max_position_embeddings))
        self._text_width = int(text.hidden_size)
        self._text_mask = bool(getattr(text, "use_attention_mask", False))

    def _check_fit(self) -> None:
        """The parts must fit together: an inpainting UNet or another model's text encoder would fail much
        later."""
        unet, channels = self.unet.config, int(self._vae_config.latent_channels)
        if unet.in_channels != channels:
            raise UserError(
                f"the UNet of {self._folder} takes {unet.in_channels} channels, its VAE makes {channels}",
                why="inpainting, depth and editing models have further inputs, which pairs do not give",
                fix="align a plain text-to-image model",
            )
        if unet.cross_attention_dim != self._text_width:
            raise UserError(
                f"the UNet of {self._folder} reads text of width {unet.cross_attention_dim}, "
                f"its text encoder writes {self._text_width}",
                fix="the folder mixes parts of two models; fetch it again",
            )

    @property
    def vae(self) -> AutoencoderKL:
        if self._vae is None:
            self._load_encoders()
        assert self._vae is not None
        return self._vae

    @property
    def text_encoder(self) -> CLIPTextModel:
        if self._text is None:
            self._load_encoders()
        assert self._text is not None
        return self._text

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along a side (8 for Stable Diffusion)."""
        return int(2 ** (len(self._vae_config.block_out_channels) - 1))

    def check_resolution(self, resolution: int) -> None:
        multiple = self.vae_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if resolution % multiple:
            raise UserError(
                f"data.resolution = {resolution} does not fit the model",
                why=f"its VAE and UNet halve the image until one cell stands for {multiple} pixels",
                fix=f"use a multiple of {multiple}, such as {-(-resolution // multiple) * multiple}",
            )

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        side = resolution // self.vae_factor
        return int(self._vae_config.latent_channels), side, side

    def to(self, device: torch.device) -> None:
        self._device = device
        modules: tuple[nn.Module | None, ...] = (self._vae, self._text)
        for module in modules:
            if module is not None:
                module.to(device)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self._device, torch.float32)).latent_dist
        return posterior.mean, posterior.logvar

    def scale_latents(self, latents: Tensor) -> Tensor:
        return latents * self._vae_config.scaling_factor

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

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return latents

    def predict(
        self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        prediction: Tensor = unet(
            noisy, timesteps, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False
        )[0]
        return prediction

    def release_encoders(self) -> None:
        self._vae = self._text = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def pipeline(self, unet: nn.Module) -> StableDiffusionPipeline:
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self._tokenizer,
            unet=unet,
            scheduler=self._sampler_class.from_pretrained(self._folder, subfolder="scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save(self, unet: nn.Module, folder: Path) -> None:
        pipeline = load_part(
            lambda: StableDiffusionPipeline.from_pretrained(
                self._folder, unet=unet, dtype=torch.float32, variant=self._variant
            ),
            f"the model {self._folder}",
        )
        pipeline.save_pretrained(folder, safe_serialization=True)

    def save_lora(self, unet: nn.Module, folder: Path) -> None:
        # Without the metadata a loader takes alpha = rank, and the LoRA would act with another strength.
        metadata = {
            key: list(value) if isinstance(value, set) else value for key, value in _lora_config(unet).items()
        }
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
            unet_lora_adapter_metadata=metadata,
            safe_serialization=True,
        )

    def fingerprint(self) -> dict[str, str]:
        if not self._fingerprint:
            self._fingerprint = self._hash_weights()
        return self._fingerprint

    def _hash_weights(self) -> dict[str, str]:
        rules = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for state_of_last_call in ("truncation", "padding"):
            del rules[state_of_last_call]
        return {
            "vae": weights_hash([self.vae]),
            "text": weights_hash([self.text_encoder], extra=json.dumps(rules, sort_keys=True)),
            "unet": weights_hash([self.unet]),
        }


def _lora_config(unet: Any) -> dict[str, Any]:
    return dict(unet.peft_config["default"].to_dict())
