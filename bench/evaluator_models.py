"""Networks of published shapes and random weights, made in memory on the device that they run on.

They are in float32; whoever takes one casts it. None is written or hashed: at the published sizes that would
take longer than the bench.
"""

from __future__ import annotations

import json
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from diffpref.evaluators.aesthetic import build_head
from diffpref.evaluators.geneval.words import NAMES
from diffpref.evaluators.image_reward import Network, add_marks
from diffpref.evaluators.open_clip_models import CONFIG, import_open_clip
from diffpref.families.miniature import clip_tokenizer

THINGS = ("dog", "car", "bench", "cat", "bird", "chair", "boat", "clock", "vase", "kite")
"""What the random detector sees; each of its queries votes for one of these."""


@dataclass(frozen=True)
class Tower:
    """A transformer: heads are as wide as in the published networks unless the tower is smaller than one."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Size:
    """Of all networks.

    text, image: of CLIP, with the side of a patch and the width that both are projected to. blip, bert: of
    ImageReward, whose patches have 16 pixels. detector: what differs from the published Mask2Former (Swin-S).
    """

    text: Tower
    image: Tower
    patch: int
    projection: int
    blip: Tower
    bert: Tower
    detector: dict[str, Any]


BERT = Tower(768, 12, 12)
VIT_B, VIT_L, VIT_H = Tower(768, 12, 12), Tower(1024, 24, 16), Tower(1280, 32, 16)
TINY = Tower(64, 2, 1)
SWIN_T = {"backbone": {"depths": [2, 2, 6, 2]}}
SMALL_DETECTOR = {
    "backbone": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
    "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_layers": 1, "num_queries": 20,
    "encoder_feedforward_dim": 32, "decoder_layers": 2, "dim_feedforward": 32, "num_attention_heads": 2,
}  # fmt: skip
SIZES = {
    "small": Size(TINY, TINY, 32, 32, TINY, TINY, SMALL_DETECTOR),
    "B-32": Size(Tower(512, 12, 8), VIT_B, 32, 512, VIT_B, BERT, SWIN_T),
    "L-14": Size(Tower(768, 12, 12), VIT_L, 14, 768, VIT_L, BERT, {}),
    "H-14": Size(Tower(1024, 24, 16), VIT_H, 14, 1024, VIT_L, BERT, {}),
}


def make_clip(size: Size, device: str) -> tuple[Any, Any]:
    """A CLIPModel and CLIP's tokenizer."""
    towers = [
        {
            "hidden_size": tower.width,
            "intermediate_size": 4 * tower.width,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
        }
        for tower in (size.text, size.image)
    ]
    config = CLIPConfig(
        text_config=towers[0] | {"vocab_size": 49_408, "eos_token_id": 2},
        vision_config=towers[1] | {"patch_size": size.patch, "image_size": 224},
        projection_dim=size.projection,
    )
    with torch.device(device), torch.no_grad():
        model = enlivened(CLIPModel(config), 0)
        common = torch.randn(size.projection)  # makes cosines positive, as trained ones are: Hessel's are cut
        model.vision_model.post_layernorm.bias += model.visual_projection.weight.T @ common
        model.text_model.final_layer_norm.bias += model.text_projection.weight.T @ common
    return model, clip_tokenizer()


def make_aesthetic(size: Size) -> Any:
    """The predictor's head, which runs on the CPU."""
    return enlivened(build_head(size.projection), 1)


def make_hps(size: Size, device: str) -> tuple[Any, Any]:
    """A network of open_clip and its tokenizer. Raises UserError where that, or torchvision, is missing."""
    open_clip = import_open_clip()
    model_config = {
        "embed_dim": size.projection,
        "vision_cfg": {
            "image_size": 224,
            "layers": size.image.layers,
            "width": size.image.width,
            "head_width": size.image.width // size.image.heads,
            "patch_size": size.patch,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49_408,
            "width": size.text.width,
            "heads": size.text.heads,
            "layers": size.text.layers,
        },
    }
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        settings = {"model_cfg": model_config, "preprocess_cfg": {}}
        (Path(folder) / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        name = f"local-dir:{folder}"
        model = open_clip.create_model(name, load_weights=False, device=device)
        return enlivened(model, 2), open_clip.get_tokenizer(name)


def make_image_reward(size: Size, device: str) -> tuple[Network, Any]:
    """ImageReward, and a vocabulary as long as that of bert-base-uncased."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for sign in string.ascii_lowercase + string.digits:
        words += [sign, f"##{sign}"]
    words += [f"[unused{number}]" for number in range(30_522 - len(words))]
    vision = BlipVisionConfig(
        hidden_size=size.blip.width,
        intermediate_size=4 * size.blip.width,
        num_hidden_layers=size.blip.layers,
        num_attention_heads=size.blip.heads,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=len(words) + 2,
        hidden_size=size.bert.width,
        encoder_hidden_size=size.blip.width,
        intermediate_size=4 * size.bert.width,
        num_hidden_layers=size.bert.layers,
        num_attention_heads=size.bert.heads,
        max_position_embeddings=512,
        bos_token_id=len(words),
        is_decoder=True,
    )
    with torch.device(device):
        network = Network(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), 224)
        enlivened(network, 3)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, do_lower_case=True)
    add_marks(tokenizer)
    return network, tokenizer


def make_detector(size: Size, device: str) -> Any:
    """A Mask2Former whose queries are sure of one of `THINGS` each.

    With plain random weights no class is above any threshold, and neither boxes nor colours are computed.
    """
    different = dict(size.detector)
    backbone = SwinConfig(
        **{"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
        | different.pop("backbone", {}),
        image_size=224,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    labels = dict(enumerate(NAMES))
    config = Mask2FormerConfig(
        backbone_config=backbone,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        **different,
    )
    torch.manual_seed(4)
    with torch.device(device):
        model: Any = Mask2FormerForUniversalSegmentation(config)
    model.to(device).eval().requires_grad_(False)  # level_embed is made on the CPU anyhow
    seen = [NAMES.index(name) for name in THINGS]
    weight, bias = model.class_predictor.weight, model.class_predictor.bias
    with torch.no_grad():
        for name, parameter in model.model.transformer_module.decoder.named_parameters():
            if name.endswith("out_proj.weight"):
                parameter.mul_(0.1)  # or attention makes all queries one
        bias.fill_(-100)
        bias[seen] = 0
        weight.normal_(std=20 * weight.shape[1] ** -0.5)
    return model


def enlivened(model: Any, seed: int) -> Any:
    """The model with weights that let its input through, of which initial ones leave hardly a trace."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)
