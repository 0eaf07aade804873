"""ImageReward: a BLIP that reads an image and its prompt together, and a head that gives one reward.

Source: J. Xu et al., *ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation*
(NeurIPS 2023), and the published package `image-reward` 1.5. The published weights are mapped by name onto
transformers' BLIP, which computes the same function.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from diffpref.errors import UserError
from diffpref.evaluators.base import Column, Runtime
from diffpref.evaluators.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    FeatureCache,
    centre_square,
    image_key,
    in_batches,
    inference,
    normalised,
)
from diffpref.evaluators.weights import check_names, from_hub, locate, read_tensors
from diffpref.families.loading import one_line
from diffpref.paths import fingerprint

PUBLISHED = "THUDM/ImageReward"
TOKENIZER = "google-bert/bert-base-uncased"
WEIGHTS = ("ImageReward.pt", "ImageReward.safetensors")
CONFIG = "med_config.json"
VERSION = "1.0"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw rewards, as the published package standardises them."""
HEAD_WIDTH = 64
"""Channels of an attention head in every published BLIP."""
CACHED_IMAGES = 128  # 0.8 MB each at full size
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\..*|blip\.text_encoder\.embeddings\.position_ids")
_VISION_NAMES = (
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^norm\.", "post_layernorm."),
)
_logger = logging.getLogger(__name__)


class Network(nn.Module):
    """Vision tower, text tower with cross-attention, and the linear head."""

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        # The package's layers 1, 3 and 5 are dropout, and nothing bends between the linear ones.
        widths = (text.config.hidden_size, 1024, 128, 64, 16, 1)
        self.mlp = nn.ModuleDict(
            {
                str(at): nn.Linear(*pair)
                for at, pair in zip((0, 2, 4, 6, 7), zip(widths, widths[1:], strict=False), strict=True)
            }
        )

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, side, side] to [B, patches + 1, width]."""
        return self.vision(pixel_values=pixels).last_hidden_state

    def rewards(self, features: Tensor, tokens: Tensor, attended: Tensor) -> Tensor:
        """Standardised rewards [B] of image features and token ids [B, MAX_TOKENS]."""
        hidden = self.text(
            input_ids=tokens,
            attention_mask=attended,
            encoder_hidden_states=features,
            is_decoder=False,
        ).last_hidden_state[:, 0]
        hidden = hidden.float()
        for layer in self.mlp.values():
            hidden = layer(hidden)
        return (hidden[:, 0] - MEAN) / STD


class ImageReward:
    """Reward of an image for its prompt. Prompts are cut at 35 tokens, as the published model does."""

    name = "image-reward"
    version = VERSION
    higher_is_better = True
    needs_prompt = True
    scale = "reward, about -2 to 2; 0 and 1 are mean and deviation of the authors' own set"

    def __init__(self, network: Network, tokenizer: Any, runtime: Runtime, weights: str) -> None:
        self.network = network.to(runtime.device).eval()
        self.network.vision.to(DTYPES[runtime.dtype])
        self.network.text.to(DTYPES[runtime.dtype])
        self.tokenizer, self.runtime = tokenizer, runtime
        self.side = int(network.vision.config.image_size)
        self.fingerprint = fingerprint(
            {
                "image-reward": VERSION,
                "weights": weights,
                "vocabulary": tokenizer.get_vocab(),
                "max_tokens": MAX_TOKENS,
                "dtype": runtime.dtype,
            }
        )
        self._features = FeatureCache(max(CACHED_IMAGES, runtime.batch))
        self._told_of_cut = False

    def columns(self) -> dict[str, Column]:
        return {self.name: Column("ImageReward", "reward learnt from human rankings of images of a prompt")}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Rewards [N]. An image that stands with several prompts passes through the vision tower once."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        size, device = self.runtime.batch, self.runtime.device
        results = [np.zeros(0, np.float32)]
        with inference():
            tokens, attended = self.tokens(prompts)
            for start in range(0, len(images), size):
                part = slice(start, start + size)
                columns = (self._image_features(images[part]), tokens[part].to(device))
                rewards = in_batches(self.network.rewards, size, *columns, attended[part].to(device))
                results.append(rewards.float().cpu().numpy())
        return np.concatenate(results)

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention [N, MAX_TOKENS]."""
        if not prompts:
            return torch.zeros(0, MAX_TOKENS, dtype=torch.long), torch.zeros(0, MAX_TOKENS, dtype=torch.long)
        options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
        found = self.tokenizer(list(prompts), return_tensors="pt", **options)
        if not self._told_of_cut:
            self._tell_of_cut(prompts, found["attention_mask"].sum(1) == MAX_TOKENS)
        return found["input_ids"], found["attention_mask"]

    def _tell_of_cut(self, prompts: Sequence[str], full: Tensor) -> None:
        candidates = [prompts[i] for i in full.nonzero()[:, 0].tolist()]
        for text, ids in zip(candidates, self.tokenizer(candidates).input_ids if candidates else (), strict=True):
            if len(ids) > MAX_TOKENS:
                self._told_of_cut = True
                _logger.warning(
                    "image-reward reads %d tokens: longer prompts are cut, as by the published model (%r has %d)",
                    MAX_TOKENS, text if len(text) <= 60 else text[:57] + "...", len(ids),
                )  # fmt: skip
                return

    def _image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """[N, patches + 1, width] for at most a batch of images."""
        keys = [image_key(image) for image in images]
        found = {key: self._features.get(key) for key in keys}
        new = {key: image for key, image in zip(keys, images, strict=True) if found[key] is None}
        if new:
            pixels = normalised([centre_square(i, self.side) for i in new.values()], CLIP_MEAN, CLIP_STD)
            pixels = pixels.to(self.runtime.device, DTYPES[self.runtime.dtype])
            for key, value in zip(new, in_batches(self.network.features, self.runtime.batch, pixels), strict=True):
                found[key] = value
                self._features.put(key, value.clone())  # else one image would keep its whole batch alive
        return torch.stack([value for key in keys if (value := found[key]) is not None])


def load(runtime: Runtime) -> ImageReward:
    """ImageReward with the weights of a file, a folder or a hub id.

    Beside the weights may stand ``med_config.json`` (else the sizes follow from the weights) and
    ``vocab.txt`` or ``tokenizer.json`` (else bert-base-uncased comes from the hub).

    Raises:
        UserError: weights, settings or vocabulary are missing, damaged or of something else.
    """
    spec = runtime.weights or PUBLISHED
    path = locate(spec, WEIGHTS, "ImageReward")
    tensors, digest = read_tensors(path)
    network = build(tensors, _settings(path.with_name(CONFIG)), path)
    return ImageReward(network, _tokenizer(path.parent, network.text.config.vocab_size), runtime, digest)


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published names of weights to those of Network; weights that scoring does not use are left out."""
    renamed = {}
    for name, value in tensors.items():
        if _UNUSED.fullmatch(name):
            continue
        if name.startswith("blip.visual_encoder."):
            inner = name.removeprefix("blip.visual_encoder.")
            for pattern, replacement in _VISION_NAMES:
                inner = re.sub(pattern, replacement, inner)
            renamed[f"vision.{inner}"] = value
        elif name.startswith("blip.text_encoder."):
            renamed[f"text.{name.removeprefix('blip.text_encoder.')}"] = value
        else:
            renamed[re.sub(r"^mlp\.layers\.", "mlp.", name)] = value
    return renamed


def build(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: Path | str) -> Network:
    """The network that published weights belong to, float32; its sizes follow from theirs.

    Raises:
        UserError: names or shapes do not fit; it lists them.
    """
    given = rename(tensors)
    try:
        vision, text = _vision_config(given), _text_config(given, settings)
    except KeyError as error:
        check = f"missing: {error.args[0]}; it has {', '.join(list(tensors)[:3])} and others"
        raise UserError(f"{source} is not a checkpoint of ImageReward", why=check) from error
    with torch.device("meta"):
        network = Network(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False))
    check_names(given, network.state_dict(), source, "ImageReward")
    network.load_state_dict({name: value.float() for name, value in given.items()}, assign=True)
    positions = torch.arange(text.max_position_embeddings).expand((1, -1))
    network.text.embeddings.register_buffer("position_ids", positions, persistent=False)
    return network.requires_grad_(False)


def _vision_config(given: Mapping[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = given["vision.embeddings.patch_embedding.weight"].shape
    patches = given["vision.embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(given["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(given, "vision.encoder.layers"),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=math.isqrt(patches) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(given: Mapping[str, Tensor], settings: Mapping[str, Any]) -> BlipTextConfig:
    vocabulary, width = given["text.embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=given["text.encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(given["text.encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(given, "text.encoder.layer"),
        num_attention_heads=settings.get("num_attention_heads", max(1, width // HEAD_WIDTH)),
        max_position_embeddings=len(given["text.embeddings.position_embeddings.weight"]),
        hidden_act=settings.get("hidden_act", "gelu"),
        layer_norm_eps=settings.get("layer_norm_eps", 1e-12),
        bos_token_id=vocabulary - 2,  # [DEC]
        is_decoder=True,  # has cross-attention; called with is_decoder=False, so attention looks both ways
    )


def _layers(given: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) + 1 :].split(".")[0] for name in given if name.startswith(f"{prefix}.")})


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", why=one_line(error)) from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} cannot be read", why="it is not a JSON object")
    return settings


def _tokenizer(folder: Path, wanted: int) -> Any:
    beside = any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json"))
    place = str(folder) if beside else str(from_hub(TOKENIZER, "vocab.txt", "ImageReward's tokenizer").parent)
    try:
        tokenizer = BertTokenizer.from_pretrained(place, do_lower_case=True)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"no tokenizer can be read from {place}", why=one_line(error)) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    if len(tokenizer) != wanted:
        raise UserError(
            f"the vocabulary in {place} does not fit ImageReward's weights",
            why=f"it has {len(tokenizer)} tokens with [DEC] and [ENC], the weights know {wanted}",
            fix="put vocab.txt of bert-base-uncased beside the weights",
        )
    return tokenizer
