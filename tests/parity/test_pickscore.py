"""PickScore against the published snippet written plainly: transformers' processor, tokenizer and model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffpref.evaluators import EVALUATORS, Runtime
from diffpref.evaluators.pixels import Pixels
from tests.clips import SIDE, SIZES, TEXTS, picture, pictures, write_hf_clip


@pytest.fixture(scope="module", params=[2, 49_407], ids=["old config", "new config"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs before and after transformers corrected the id of the end token."""
    return write_hf_clip(tmp_path_factory.mktemp("pickscore"), end=request.param)


def published(folder: Path, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
    """The model card's computation, one pair at a time."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = processor(images=image, return_tensors="pt")
        tokens = tokenizer(prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            image_embs = model.get_image_features(**pixels).pooler_output
            image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
            text_embs = model.get_text_features(**tokens).pooler_output
            text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
            scores.append((model.logit_scale.exp() * (text_embs @ image_embs.T))[0, 0].item())
    return np.array(scores)


@pytest.mark.parametrize("side", [SIDE, 224])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_pixels_are_those_of_the_published_processor(size: tuple[int, int], side: int) -> None:
    image = picture(*size)
    crop = {"height": side, "width": side}
    expected = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)(
        images=image, return_tensors="pt"
    )["pixel_values"][0]
    assert torch.equal(Pixels(side, "crop, floor")(image), expected)


def test_scores_are_the_published_ones(folder: Path) -> None:
    images, prompts = zip(*[(image, text) for image in pictures() for text in TEXTS], strict=True)
    expected = published(folder, list(images), list(prompts))
    scores = EVALUATORS["pickscore"](Runtime(str(folder))).score(images, prompts)
    assert scores.dtype == np.float32
    assert np.abs(scores - expected).max() < 1e-5 * 87.5  # of the cosine: scores are 87.5 times that
    assert len(np.unique(expected.round(3))) > 40  # the small network does tell these pairs apart
