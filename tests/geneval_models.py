"""A Mask2Former and a CLIP of the real classes, small and random, as folders for geneval's weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from diffpref.evaluators.geneval.words import NAMES
from diffpref.families.miniature import clip_tokenizer

COCO = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
LABELS = {index: COCO.get(name, name) for index, name in enumerate(NAMES)}
"""As COCO itself, and so the published detectors, call them."""


def write_detector(
    folder: Path, labels: dict[int, str] | None = None, sure_of: str | None = None, seed: int = 3
) -> Path:
    """sure_of: a class that every query votes for; without it no class is above any threshold."""
    labels = LABELS if labels is None else labels
    torch.manual_seed(seed)
    backbone = SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1,
        encoder_feedforward_dim=32, decoder_layers=2, dim_feedforward=32, num_attention_heads=2,
        num_queries=10, id2label=labels, label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    if sure_of is not None:
        with torch.no_grad():
            model.class_predictor.bias[{v: k for k, v in labels.items()}[sure_of]] = 12.0
    model.save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    tokenizer = clip_tokenizer()
    torch.manual_seed(4)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config={**tower, **ids, "vocab_size": len(tokenizer)},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_geneval(folder: Path, seed: int = 3) -> Path:
    """Both, as geneval's weights name them; the detector sees dogs everywhere."""
    detector = write_detector(folder / "detector", sure_of="dog", seed=seed)
    return Path(f"{detector},{write_clip(folder / 'clip')}")
