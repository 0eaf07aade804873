"""What the parity test of ImageReward and the script that made its golden numbers share.

Weights, vocabulary and images follow from formulas in integer arithmetic, so that two environments years
apart make the same ones without a file passing between them. Needs numpy and Pillow alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

VISION: dict[str, Any] = {"embed_dim": 128, "depth": 2, "num_heads": 2, "patch_size": 32}
"""A small vision tower; 64 channels a head, as in every published one."""

_WORDS = (
    "a", "an", "the", "of", "and", "photo", "painting", "cat", "dog", "red", "blue", "green", "circle",
    "square", "sun", "set", "over", "mountain", "with", "in", "style", "high", "detail", "amp", "##ing",
    "##ed",
)  # fmt: skip
_SIGNS = tuple("abcdefghijklmnopqrstuvwxyz0123456789.,:;!?&'\"()-_#/")
VOCABULARY = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_SIGNS, *(f"##{sign}" for sign in _SIGNS[:36]),
    *(word for word in _WORDS if len(word) > 1),
)  # fmt: skip
"""A WordPiece vocabulary of the kind of bert-base-uncased."""

TEXT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(VOCABULARY) + 2,
    "encoder_width": VISION["embed_dim"],
    "add_cross_attention": True,
}
"""med_config.json of the small model: the published file's keys."""

PROMPTS = {
    "plain": "a photo of a red circle and a blue square",
    "long": "a photo of " + ", ".join(f"a red circle over the sunset mountain number {n}" for n in range(9)),
    "emoji": "a cat \U0001f431 and a dog \U0001f436\U0001f3fd, caf\u00e9 \u5c71",
    "escaped": "cats &amp; dogs &lt;painting&gt;",
    "special": "a [SEP] photo [DEC] of [ENC] a cat",
    "space": "  A  PHOTO\tof\na   Cat!  ",
    "empty": "",
}
SIZES = {
    "square": (224, 224),
    "small": (40, 64),
    "portrait": (96, 410),
    "landscape": (410, 97),
    "odd margins": (1000, 768),
    "half margins": (227, 224),
    "one pixel": (1, 1),
}
"""(width, height)"""
MODES = ("RGBA", "L", "P", "CMYK")


def cases() -> dict[str, tuple[Image.Image, str]]:
    """Every size and mode (of the file, opened in RGB) with the plain prompt, every prompt with one image."""
    found = {f"size: {name}": (picture(size), PROMPTS["plain"]) for name, size in SIZES.items()}
    found |= {f"mode: {mode}": (picture((300, 231), mode).convert("RGB"), PROMPTS["plain"]) for mode in MODES}
    found |= {f"prompt: {name}": (picture((320, 240)), prompt) for name, prompt in PROMPTS.items()}
    return found


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Waves and edges, different in every channel; the alpha channel of RGBA varies as well."""
    x, y = np.meshgrid(np.arange(size[0], dtype=np.int64), np.arange(size[1], dtype=np.int64))
    waves = [(x * (3 + c) + y * (7 - 2 * c) + (x * y) // (31 + 6 * c)) % 256 for c in range(3)]
    blocks = ((x // 17 + y // 23) % 3 == 0) * 90
    rgb = np.stack([(wave + blocks * (c - 1)).clip(0, 255) for c, wave in enumerate(waves)], -1)
    image = Image.fromarray(rgb.astype(np.uint8))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(((x * 5 + y * 2) % 256).astype(np.uint8)))
    elif mode == "P":
        image = image.quantize(64)
    elif mode != "RGB":
        image = image.convert(mode)
    return image


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """float32 weights by name: uniform, of a size that keeps activations alive in any depth."""
    return {name: _weight(name, tuple(shape)) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    noise = _uniform(zlib.crc32(name.encode()), int(np.prod(shape))).reshape(shape)
    norm = "norm" in name.lower()
    if len(shape) == 1:
        return (0.1 * noise + (1.0 if norm and name.endswith("weight") else 0.0)).astype(np.float32)
    embedding = ("embed" in name and "proj" not in name) or "token" in name
    fan_in = 1 if embedding else int(np.prod(shape[1:]))
    return (noise * np.sqrt(3 / fan_in)).astype(np.float32)


def _uniform(seed: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Numbers in [-1, 1) by SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1.0
