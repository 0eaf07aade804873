"""LAION's predictor against its published formula: linear layers on the unit vector of OpenAI's crop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from diffpref.errors import UserError
from diffpref.evaluators import EVALUATORS, Runtime
from diffpref.evaluators.aesthetic import STEM
from tests.clips import WIDTH, pictures, write_aesthetic
from tests.parity.test_clipscore import openai_pixels


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPREF_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_aesthetic(tmp_path_factory.mktemp("aesthetic"))


def test_scores_are_the_published_formula(folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder / "clip").eval()
    head = torch.load(folder / f"{STEM}.pth", weights_only=True)
    expected = []
    for image in pictures():
        with torch.no_grad():
            vector = model.get_image_features(pixel_values=openai_pixels(image)[None]).pooler_output[0]
        value = vector.double().numpy()
        value = value / np.linalg.norm(value)
        for layer in (0, 2, 4, 6, 7):
            weight, bias = (head[f"layers.{layer}.{part}"].double().numpy() for part in ("weight", "bias"))
            value = weight @ value + bias
        expected.append(value.item())
    evaluator = EVALUATORS["aesthetic"](Runtime(str(folder)))
    scores = evaluator.score(pictures(), [""] * len(expected))
    assert np.abs(scores - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.std(expected) > 0.01 * np.abs(expected).max()
    assert not evaluator.needs_prompt


def test_the_head_of_another_clip_is_refused(folder: Path, tmp_path: Path) -> None:
    wrong = write_aesthetic(tmp_path / "wrong")
    state = torch.load(wrong / f"{STEM}.pth", weights_only=True)
    state["layers.0.weight"] = torch.zeros(1024, 768)
    torch.save(state, wrong / f"{STEM}.pth")
    with pytest.raises(UserError) as error:
        EVALUATORS["aesthetic"](Runtime(str(wrong)))
    assert f"layers.0.weight: [1024, 768], expected [1024, {WIDTH}]" in str(error.value)
