"""ImageReward: a BLIP that reads an image and its prompt together, and a head that gives one reward.

Source: J. Xu et al., *ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation*
(NeurIPS 2023), and the published package `image-reward` 1.5. The published weights are mapped by name onto
transformers' BLIP, which computes the same function.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from diffpref.errors import UserError
from diffpref.evaluators.agreement import with_dtype
from diffpref.evaluators.base import Column, Runtime
from diffpref.evaluators.checkpoints import (
    check_keys,
    download,
    find_file,
    one_line,
    read_state,
    weights_hash,
)
from diffpref.evaluators.clip import DTYPES, placed
from diffpref.evaluators.pixels import Pixels, content, distinct
from diffpref.paths import fingerprint
from diffpref.transfer import to_device

PUBLISHED = "THUDM/ImageReward"
TOKENIZER = "google-bert/bert-base-uncased"
WEIGHTS = ("ImageReward.pt", "ImageReward.safetensors")
CONFIG = "med_config.json"
VERSION = "1"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw rewards, as the published package standardises them."""
HEAD_WIDTH = 64
"""Channels of an attention head in every published BLIP."""
CACHED_IMAGES = 128
"""Whose features are kept: 0.8 MB each in the published size."""

CPU_PAIRS = 4
"""Pairs in a pass on the CPU, and images one by one: more together are no faster there, and a short pass is
filled up at full cost."""

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
Floats = NDArray[np.float32]


class Network(nn.Module):
    """Vision tower for images of `side` pixels, text tower with cross-attention, and the linear head."""

    def __init__(self, vision: Any, text: Any, side: int) -> None:
        super().__init__()
        self.vision, self.text, self.side = vision, text, side
        # Layers 1, 3 and 5 are dropout; there is no activation between the linear ones.
        widths = (text.config.hidden_size, 1024, 128, 64, 16, 1)
        places = ("0", "2", "4", "6", "7")
        self.mlp = nn.ModuleDict(dict(zip(places, starmap(nn.Linear, pairwise(widths)), strict=True)))

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
    """Reward of an image for its prompt, of which the network reads 35 tokens."""

    name = "image-reward"
    higher_is_better = True
    needs_prompt = True
    any_mode = True
    scale = "reward, about -2 to 2; 0 and 1 are mean and standard deviation over the authors' images"

    def __init__(self, network: Network, tokenizer: Any, runtime: Runtime, weights: str = "") -> None:
        """weights: what the fingerprint says of the network's values; "" for their hash."""
        self.device, self.dtype = placed(runtime), DTYPES[runtime.dtype]
        on_cpu = self.device.type == "cpu"
        self.image_rows = 1 if on_cpu else runtime.batch
        self.pair_rows = min(CPU_PAIRS, runtime.batch) if on_cpu else runtime.batch
        self.version = with_dtype(VERSION, runtime.dtype)
        self.tokenizer = tokenizer
        self.pixels = Pixels(network.side, "crop, round", rgb="last")
        self.fingerprint = fingerprint(
            {
                "evaluator": self.name,
                "version": self.version,
                "weights": weights or weights_hash(network),
                "vocabulary": tokenizer.get_vocab(),
                "max_tokens": MAX_TOKENS,
                "pixels": self.pixels.describe(),
            }
        )
        self.network = network.to(self.device).eval()
        for tower in (self.network.vision, self.network.text):
            tower.to(dtype=self.dtype)  # the head stays in fp32, as in the package
        self._known: OrderedDict[Hashable, Tensor] = OrderedDict()

    def columns(self) -> dict[str, Column]:
        return {
            self.name: Column("ImageReward", "reward learned from human rankings of images of one prompt"),
            f"{self.name}.cut": Column(
                "Tokens cut",
                f"tokens of the prompt beyond the {MAX_TOKENS} that the network reads, which it never sees",
                higher_is_better=False,
                per_image=True,
            ),
        }

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Floats:
        """Rewards [N]. An image that stands with several prompts passes through the vision tower once, and
        with one prompt several times through the text tower once.

        Every pass has the same number of rows, filled up with copies of the last, so that a reward has the
        same bits whatever else is scored with it.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        keys = [content(image) for image in images]
        firsts, rows = distinct(list(zip(keys, prompts, strict=True)))
        once = [(keys[first], images[first]) for first in firsts]
        ids, attended = self.tokens([prompts[first] for first in firsts])
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        rewards = [torch.zeros(0, device=self.device)]
        with torch.inference_mode(), exact:
            for start in range(0, len(once), self.pair_rows):
                part = slice(start, start + self.pair_rows)
                given = (self._features(once[part]), ids[part], attended[part])
                filled = (to_device(_filled(each, self.pair_rows), self.device) for each in given)
                rewards.append(self.network.rewards(*filled)[: len(given[1])])
            return np.asarray(torch.cat(rewards).cpu().numpy(), np.float32)[
                rows
            ]  # here the device is waited for

    def explain(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> tuple[Floats, dict[str, Floats | list[str]]]:
        lengths = [len(self.tokenizer(prompt, verbose=False).input_ids) for prompt in prompts]
        cut = np.array([max(0, length - MAX_TOKENS) for length in lengths], np.float32)
        return self.score(images, prompts), {"cut": cut}

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention [N, 35], both int64."""
        if not prompts:
            return (none := torch.zeros(0, MAX_TOKENS, dtype=torch.long)), none
        found = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return found["input_ids"], found["attention_mask"]

    def _features(self, images: Sequence[tuple[Hashable, Image.Image]]) -> Tensor:
        """[N, patches + 1, width] of images, each with its `content`; known ones from memory."""
        found = {key: self._known[key] for key, _ in images if key in self._known}
        new = {key: image for key, image in images if key not in found}
        for start in range(0, len(new), self.image_rows):
            part = list(new)[start : start + self.image_rows]
            pixels = _filled(torch.stack([self.pixels(new[key]) for key in part]), self.image_rows)
            features = self.network.features(to_device(pixels, self.device, self.dtype))
            # copies, since a view would keep the whole pass in memory
            found |= {key: features[row].clone() for row, key in enumerate(part)}
        for key, value in found.items():
            self._known[key] = value
            self._known.move_to_end(key)
        while len(self._known) > CACHED_IMAGES:
            self._known.popitem(last=False)
        return torch.stack([found[key] for key, _ in images])


def _filled(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows[-1:].expand(count - len(rows), *rows.shape[1:])])


def load(runtime: Runtime) -> ImageReward:
    """ImageReward with the weights of a file, a folder or a hub id.

    Beside the weights may stand ``med_config.json`` (else the sizes follow from the weights) and
    ``vocab.txt`` or ``tokenizer.json`` (else bert-base-uncased comes from the hub).

    Raises:
        UserError: weights, settings or vocabulary are missing, damaged or of something else.
    """
    path = find_file(runtime.weights, WEIGHTS, PUBLISHED, "weights of image-reward")
    network = build(read_state(path), _settings(path.with_name(CONFIG)), str(path))
    return ImageReward(network, _tokenizer(path.parent, network.text.config.vocab_size), runtime)


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


def build(state: Mapping[str, Tensor], settings: Mapping[str, Any], source: str) -> Network:
    """The network that published weights belong to, float32; its sizes follow from theirs.

    Raises:
        UserError: names or shapes do not fit; it lists them.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    given = rename(state)
    try:
        sizes = _vision_sizes(given)
        vision = BlipVisionConfig(**sizes)
        text = BlipTextConfig(**_text_sizes(given, settings))
    except (KeyError, ValueError) as error:  # no such weight, or one with other dimensions
        raise UserError(
            f"{source} does not hold the weights of ImageReward",
            why=f"{one_line(error)} is missing or unlike; it holds {', '.join(list(state)[:3])} ...",
        ) from error
    with torch.device("meta"):  # no time for random weights
        towers = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        network = Network(*towers, side=sizes["image_size"])
    wanted = network.state_dict()
    check_keys(
        source,
        "the weights of ImageReward",
        missing=[name for name in wanted if name not in given],
        unexpected=[name for name in given if name not in wanted],
        shapes=[
            f"{name}: {list(given[name].shape)}, expected {list(value.shape)}"
            for name, value in wanted.items()
            if name in given and given[name].shape != value.shape
        ],
    )
    network.load_state_dict({name: value.float() for name, value in given.items()}, assign=True)
    positions = torch.arange(text.max_position_embeddings).expand((1, -1))
    network.text.embeddings.register_buffer("position_ids", positions, persistent=False)
    return network.requires_grad_(False)


def _vision_sizes(given: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch, _ = given["vision.embeddings.patch_embedding.weight"].shape
    patches = given["vision.embeddings.position_embedding"].shape[1] - 1
    return {
        "hidden_size": width,
        "intermediate_size": len(given["vision.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": _layers(given, "vision.encoder.layers"),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "image_size": math.isqrt(patches) * patch,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }


def _text_sizes(given: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary, width = given["text.embeddings.word_embeddings.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "encoder_hidden_size": given["text.encoder.layer.0.crossattention.self.key.weight"].shape[1],
        "intermediate_size": len(given["text.encoder.layer.0.intermediate.dense.weight"]),
        "num_hidden_layers": _layers(given, "text.encoder.layer"),
        "num_attention_heads": settings.get("num_attention_heads", max(1, width // HEAD_WIDTH)),
        "max_position_embeddings": len(given["text.embeddings.position_embeddings.weight"]),
        "hidden_act": settings.get("hidden_act", "gelu"),
        "layer_norm_eps": settings.get("layer_norm_eps", 1e-12),
        "bos_token_id": vocabulary - 2,  # [DEC]
        "is_decoder": True,  # it has cross-attention; calls say False: attention looks both ways
    }


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


def add_marks(tokenizer: Any) -> None:
    """Gives BERT's tokenizer the two tokens that BLIP adds."""
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})


def _tokenizer(folder: Path, wanted: int) -> Any:
    if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        folder = download(TOKENIZER, ["vocab.txt"], "vocabulary of image-reward").parent
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(folder, do_lower_case=True)
    except Exception as error:  # the tokenizers library has types of its own
        raise UserError(f"no tokenizer can be read from {folder}", why=one_line(error)) from error
    add_marks(tokenizer)
    if len(tokenizer) != wanted:
        raise UserError(
            f"the vocabulary in {folder} does not fit ImageReward's weights",
            why=f"it has {len(tokenizer)} tokens with [DEC] and [ENC], the weights know {wanted}",
            fix="put vocab.txt of bert-base-uncased beside the weights",
        )
    return tokenizer
