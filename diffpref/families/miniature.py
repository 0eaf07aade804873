"""Random-initialised miniatures of the real model classes, built offline in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def stable_diffusion(
    folder: str | Path, prediction_type: str = "epsilon", seed: int = 0, **unet: Any
) -> Path:
    """Write `build_stable_diffusion(...)` to `folder`, in diffusers' format, and return the folder."""
    build_stable_diffusion(prediction_type, seed, **unet).save_pretrained(folder)
    return Path(folder)


def build_stable_diffusion(
    prediction_type: str = "epsilon", seed: int = 0, **unet: Any
) -> StableDiffusionPipeline:
    """A miniature Stable Diffusion: 0.3M parameters, 8x VAE, text width 32, 77 tokens.

    `unet`: further or other settings of UNet2DConditionModel. The same seed gives the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=tokenizer(),
            unet=_unet(**unet),
            scheduler=_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that spells every word by its bytes, with a few merges so that merging happens."""
    letters = _byte_alphabet()
    merges = ["r e", "re d</w>", "b l", "u e</w>", "bl ue</w>", "a r"]
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(merge.replace(" ", "") for merge in merges),
    ]
    vocabulary = {word: number for number, word in enumerate([*dict.fromkeys(words), START, END])}
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]  # what merges.txt becomes when it is loaded
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _text_encoder() -> CLIPTextModel:
    words = tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    ).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.6,
    )


def _unet(**settings: Any) -> UNet2DConditionModel:
    defaults: dict[str, Any] = {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(defaults | settings))


def _scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
