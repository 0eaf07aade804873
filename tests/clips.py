"""Small random CLIPs in the formats of the evaluators' weights, and inputs on which references differ."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffpref.evaluators.aesthetic import STEM, build_head
from diffpref.families.miniature import clip_tokenizer

SIDE = 64
WIDTH = 24

LONG = "a red fox and a blue heron stand by the river at dawn, " * 12
TEXTS = (
    "a photo of a cat",
    "Two  DOGS\tplaying\nchess, it's the dog's move!",
    "",
    LONG,
    "🐱 in a café — naïve, 4k 😀",
    "black &amp; white, &amp;lt;b&amp;gt;, salt & pepper",
    "â€œquotedâ€\x9d text, ﬁne ligature",
)
SIZES = {
    "square": (96, 96),
    "input": (SIDE, SIDE),
    "portrait": (832, 1216),
    "odd": (1000, 768),
    "landscape": (301, 120),
    "small": (20, 33),
    "line": (3, 200),
}
"""(width, height): margins after resizing that are even, odd, and odd either side of a banker's rounding."""


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise of two grains over a ramp: a shift by one pixel changes every value."""
    random = np.random.default_rng([seed, width, height])
    coarse = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((width, height))
    fine = random.integers(0, 60, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) * 0.7 + fine).astype(np.uint8))


def pictures() -> list[Image.Image]:
    return [picture(*size, seed) for seed, size in enumerate(SIZES.values())]


MODES = {"1": "PNG", "P": "PNG", "LA": "PNG", "RGBA": "PNG", "CMYK": "TIFF", "L": "PNG", "I;16": "PNG"}
"""Modes of image files beside RGB, with a format that has them."""


def file_of(mode: str, width: int = 300, height: int = 231) -> bytes:
    """An image file of a mode: edges, colours, and an alpha channel that varies."""
    image = picture(width, height)
    alpha = picture(width, height, seed=1).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    elif mode == "P":
        image = image.quantize(32)
    elif mode == "LA":
        image = Image.merge("LA", (image.convert("L"), alpha))
    elif mode == "RGBA":
        image.putalpha(alpha)
    else:
        image = image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, MODES[mode])
    assert Image.open(io.BytesIO(stream.getvalue())).mode == mode
    return stream.getvalue()


def write_hf_clip(folder: Path, seed: int = 0, side: int = SIDE, end: int = 2) -> Path:
    """A random CLIPModel with CLIP's tokenizer. end: eos_token_id, 2 in OpenAI's and LAION's configs."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config=tower | {"vocab_size": 49_408, "eos_token_id": end, "bos_token_id": 0},
        vision_config=tower | {"image_size": side, "patch_size": side // 8},
        projection_dim=WIDTH,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config).eval()
        _liven(model)
    model.logit_scale.data.fill_(float(np.log(87.5)))
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def write_aesthetic(folder: Path, seed: int = 0) -> Path:
    """A random head in the published pickle, with the CLIP beside it."""
    write_hf_clip(folder / "clip", seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        head = build_head(WIDTH)
        for parameter in head.parameters():
            parameter.data = torch.randn_like(parameter) * 0.2
    torch.save(head.state_dict(), folder / f"{STEM}.pth")
    return folder


OPEN_CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49_408, "width": 32, "heads": 4, "layers": 2},
}


def write_open_clip(folder: Path, names: tuple[str, ...], seed: int = 0) -> Path:
    """A random open_clip network: its config, and its weights under ``state_dict`` in each named pickle.

    Needs open_clip to be importable.
    """
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_cfg": OPEN_CLIP_CONFIG, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    for number, name in enumerate(names):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
            _liven(model)
        torch.save({"epoch": 0, "state_dict": model.state_dict()}, folder / name)
    return folder


@lru_cache
def _tokenizer() -> CLIPTokenizer:
    return clip_tokenizer()


def _liven(model: torch.nn.Module) -> None:
    """Initial weights hardly let the input through; these do, so that small differences show."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn_like(parameter) * (1.5 / parameter.shape[-1] ** 0.5)
        elif parameter.ndim == 1:
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
