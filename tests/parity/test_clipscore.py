"""CLIPScore's presets against their definitions written plainly, on the same random network."""

from __future__ import annotations

import html
import io
from pathlib import Path

import ftfy
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffpref.data.images import decode_for_scoring
from diffpref.evaluators import EVALUATORS, Runtime
from diffpref.scoring.judges import Judge
from tests.clips import LONG, MODES, SIDE, TEXTS, file_of, picture, pictures, write_hf_clip

IMAGES, PROMPTS = zip(*[(image, text) for image in pictures() for text in TEXTS], strict=True)
CROP = {"height": SIDE, "width": SIDE}
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=CROP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_clip(tmp_path_factory.mktemp("clipscore"), seed=1)


@pytest.fixture(scope="module")
def model(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


def image_vector(model: CLIPModel, pixels: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return unit(model.get_image_features(pixel_values=pixels[None]).pooler_output[0].numpy())


def text_vector(model: CLIPModel, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return unit(model.get_text_features(input_ids=torch.tensor([ids])).pooler_output[0].numpy())


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector**2).sum())


def openai_pixels(image: Image.Image) -> torch.Tensor:
    """Resize of the shortest edge, crop with Python's rounding, statistics of OpenAI's training images."""
    width, height = image.size
    if width < height:
        width, height = SIDE, int(SIDE * height / width)
    else:
        width, height = int(SIDE * width / height), SIDE
    left, top = round((width - SIDE) / 2.0), round((height - SIDE) / 2.0)
    small = image.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
    values = np.asarray(small, np.float64)[top : top + SIDE, left : left + SIDE] / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy(((values - mean) / std).transpose(2, 0, 1)).float()


def openai_tokens(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    ids = tokenizer(text)["input_ids"]
    return ids if len(ids) <= 77 else [*ids[:76], tokenizer.eos_token_id]


def difference(preset: str, folder: Path, expected: list[float]) -> float:
    scores = EVALUATORS[preset](Runtime(str(folder), batch=6)).score(IMAGES, PROMPTS)
    assert len(np.unique(np.round(expected, 3))) > 10
    return float(np.abs(scores - np.array(expected)).max())


def test_jmhessel(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        words = text_vector(model, openai_tokens(tokenizer, "A photo depicts " + prompt))
        expected.append(2.5 * np.clip(np.sum(image_vector(model, openai_pixels(image)) * words), 0, None))
    assert min(expected) == 0 < max(expected)
    assert difference("clipscore-jmhessel", folder, expected) < 1e-5


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "I;16"])
def test_files_that_are_not_rgb(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer, mode: str) -> None:
    """CLIPScore's authors resize what the file holds and convert the result; transformers converts first."""
    data, prompt = file_of(mode), TEXTS[0]
    opened = Image.open(io.BytesIO(data))
    words = unit(text_vector(model, openai_tokens(tokenizer, f"A photo depicts {prompt}")))
    stored, converted = (
        2.5 * max(0.0, float(image_vector(model, openai_pixels(image)) @ words))
        for image in (opened, opened.convert("RGB"))
    )
    metric = EVALUATORS["clipscore-jmhessel"](Runtime(str(folder)))
    judged = Judge(metric, Runtime(str(folder)), 1).evaluate([decode_for_scoring(data)], [prompt], ["it"])
    assert judged["clipscore-jmhessel"][0] == pytest.approx(stored, abs=1e-6)
    assert (abs(stored - converted) > 1e-4) == (mode in ("1", "P", "LA", "RGBA"))
    plain = EVALUATORS["clipscore"](Runtime(str(folder)))
    assert plain.score([decode_for_scoring(data)], [prompt]) == plain.score([opened.convert("RGB")], [prompt])


def test_two_palettes_of_the_same_numbers_are_two_images(folder: Path) -> None:
    """Vectors are remembered by content."""
    first = picture(96, 96).quantize(16)
    second = first.copy()
    second.putpalette(bytes(reversed(first.getpalette())))
    metric = EVALUATORS["clipscore-jmhessel"](Runtime(str(folder)))
    both = metric.score([first, second], [TEXTS[0]] * 2)
    assert abs(both[0] - both[1]) > 1e-4


def test_raw_cosine(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        pixels = PROCESSOR(images=image, return_tensors="pt")["pixel_values"][0]
        ids = tokenizer(prompt, truncation=True, max_length=77)["input_ids"]
        expected.append(float(image_vector(model, pixels) @ text_vector(model, ids)))
    assert min(expected) < 0
    assert difference("clipscore", folder, expected) < 1e-5


def test_torchmetrics(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Its tokens are cut without regard to the end token; the clamp is on the mean, never on one image."""
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        pixels = PROCESSOR(images=image, return_tensors="pt")["pixel_values"][0]
        ids = tokenizer(prompt, padding=True)["input_ids"][:77]
        expected.append(100 * float(image_vector(model, pixels) @ text_vector(model, ids)))
    assert min(expected) < 0
    assert difference("clipscore-torchmetrics", folder, expected) < 1e-4  # of values up to 100


def test_torchmetrics_gives_all_long_prompts_the_same_text(folder: Path) -> None:
    """What its cut leads to, and why the number of cut tokens stands beside each image."""
    image = pictures()[0]
    prompts = [LONG, "something quite different " * 40]
    metric = EVALUATORS["clipscore-torchmetrics"](Runtime(str(folder)))
    (first, second), details = metric.explain([image, image], prompts)
    assert first == second
    assert (details["cut"] > 0).all()
    first, second = EVALUATORS["clipscore"](Runtime(str(folder))).score([image, image], prompts)
    assert abs(first - second) > 1e-3


def test_html_entities_matter_to_openais_tokenizer_only(folder: Path) -> None:
    image = pictures()[0]
    prompts = ["black &amp; white", "black & white"]
    same = {
        name: len(set(EVALUATORS[name](Runtime(str(folder))).score([image] * 2, prompts))) == 1
        for name in ("clipscore", "clipscore-jmhessel", "clipscore-torchmetrics")
    }
    assert same == {"clipscore": False, "clipscore-jmhessel": True, "clipscore-torchmetrics": False}
