"""CLIP networks in transformers' format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from diffpref.errors import UserError
from diffpref.evaluators.base import Dtype, Runtime
from diffpref.evaluators.checkpoints import check_keys, not_loaded, one_line, weights_hash
from diffpref.evaluators.clip import DTYPES, Network
from diffpref.evaluators.pixels import OPENAI_MEAN, OPENAI_STD, Pixels
from diffpref.evaluators.texts import BytePairs
from diffpref.paths import resolve_or_hub_id

_TOKENIZERS = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14")
"""Whose tokenizer is taken for weights published without one, as PickScore's are: all CLIPs share it."""
_PREPROCESSOR = "preprocessor_config.json"


def load_hf_network(weights: str, device: torch.device, runtime: Runtime) -> Network:
    """The CLIP of a folder that ``save_pretrained`` wrote, or of a hub id.

    Its own rules are those of transformers' Pillow processor and tokenizer.

    Raises:
        UserError: not there, not a CLIP, weights that do not fit the configuration.
    """
    place = str(resolve_or_hub_id(weights, "CLIP weights"))
    model = _model(place)
    text, vision = model.config.text_config, model.config.vision_config
    tokenizer = _tokenizer(place)
    if len(tokenizer) > text.vocab_size:
        raise UserError(
            f"the tokenizer of {place} does not belong to its network",
            why=f"it has {len(tokenizer)} tokens, the network knows {text.vocab_size}",
            fix="fetch the model again",
        )
    return hf_network(
        model, tokenizer, _pixels(place, vision.image_size), device, runtime.dtype, weights_hash(model)
    )


def hf_network(
    model: Any, tokenizer: Any, pixels: Pixels, device: torch.device, dtype: Dtype, weights: str
) -> Network:
    """The network of a CLIPModel in memory, which is moved and cast in place.

    pixels: its publisher's rule. weights: what fingerprints say of its values.
    """
    text = model.config.text_config
    logit_scale = float(model.logit_scale.detach().float().exp())
    model.to(device, DTYPES[dtype])
    return Network(
        weights=weights,
        device=device,
        dtype=dtype,
        pixels=pixels,
        text=BytePairs(tokenizer, text.max_position_embeddings),
        encode_images=lambda pixels: _features(model.get_image_features(pixel_values=pixels)),
        encode_texts=lambda ids: _features(model.get_text_features(input_ids=ids)),
        context=text.max_position_embeddings,
        pad=tokenizer.eos_token_id,  # attention is causal: what follows the end changes nothing before it
        width=model.config.projection_dim,
        logit_scale=logit_scale,
    )


def _features(output: Any) -> torch.Tensor:
    """transformers 5 returns an object that holds the projected features, older ones the tensor itself."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _model(place: str) -> Any:
    from transformers import AutoConfig, CLIPModel

    try:
        config = AutoConfig.from_pretrained(place)
    except Exception as error:  # OSError, ValueError of unknown types, errors of the hub and of JSON
        raise not_loaded("the CLIP model", place, error) from error
    if config.model_type != "clip":
        raise UserError(
            f"{place} is no CLIP model",
            why=f"its config.json says {config.model_type!r}",
            fix="give a folder or hub id of transformers' CLIPModel, or open_clip:ARCHITECTURE/TAG",
        )
    read: Any = CLIPModel.from_pretrained
    try:
        model, report = read(
            place, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # safetensors, the hub and the file system each have types of their own
        raise not_loaded("the CLIP model", place, error) from error
    check_keys(
        place,
        "the weights of the CLIP that its config.json describes",
        missing=list(report["missing_keys"]),
        unexpected=list(report["unexpected_keys"]),
        shapes=[
            f"{name}: {list(found)}, expected {list(wanted)}"
            for name, found, wanted in report["mismatched_keys"]
        ],
    )
    return model.eval().requires_grad_(False)


def _tokenizer(place: str) -> Any:
    from transformers import CLIPTokenizer

    local = Path(place)
    own = not local.is_dir() or any((local / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    reason: Exception | None = None
    for source in (*([place] if own else []), *_TOKENIZERS):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(source)
        except Exception as error:  # as above; the next source may have it
            reason = reason or error
            continue
        if len(tokenizer) > 3:  # a place without vocabulary gives a tokenizer of special tokens only
            return tokenizer
    raise UserError(
        f"no tokenizer for {place}",
        why=f"it has no tokenizer.json, and those of {' and '.join(_TOKENIZERS)} are not to be had"
        + (f": {one_line(reason)}" if reason else ""),
        fix="put tokenizer.json of any CLIP model beside the weights, "
        f"or fetch one where there is a network: hf download {_TOKENIZERS[1]} tokenizer.json",
    ) from reason


def _pixels(place: str, side: int) -> Pixels:
    """The published rule: channel statistics from the preprocessor's file, where there is one."""
    from huggingface_hub import try_to_load_from_cache

    local = Path(place)
    found = local / _PREPROCESSOR if local.is_dir() else try_to_load_from_cache(place, _PREPROCESSOR)
    settings: dict[str, Any] = {}
    if isinstance(found, str | Path) and Path(found).is_file():
        try:
            settings = json.loads(Path(found).read_text(encoding="utf-8"))
        except ValueError as error:
            raise not_loaded("the CLIP model", place, error) from error
    if not all(settings.get(f"do_{step}", True) for step in ("resize", "center_crop", "normalize")):
        raise UserError(
            f"{place} prepares images in a way that is not supported",
            why=f"its {_PREPROCESSOR} leaves out resizing, cropping or normalising",
        )
    mean, std = settings.get("image_mean", OPENAI_MEAN), settings.get("image_std", OPENAI_STD)
    return Pixels(side, "crop, floor", tuple(mean), tuple(std))
