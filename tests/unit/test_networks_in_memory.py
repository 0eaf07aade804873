"""Evaluators on networks in memory: the same scores as from files, under a name in place of a hash."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from diffpref.evaluators import EVALUATORS, Runtime, aesthetic, clip_score, pickscore
from diffpref.evaluators.agreement import Agreement
from diffpref.evaluators.checkpoints import weights_hash
from diffpref.evaluators.clip import Clip
from diffpref.evaluators.hf_clip import hf_network
from diffpref.evaluators.loading import load_clip
from tests.clips import picture, write_aesthetic, write_hf_clip

IMAGES = [picture(64, 67), picture(96, 30, 1)]
PROMPTS = ["a red fox", "two dogs by the river at dawn"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_clip(tmp_path_factory.mktemp("clip"))


def in_memory(folder: Path, weights: str, dtype: str = "fp32") -> Clip:
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = load_clip(str(folder), Runtime(device="cpu")).pixels
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    network = hf_network(model, tokenizer, pixels, torch.device("cpu"), dtype, weights)  # type: ignore[arg-type]
    return Clip(network, network.pixels, network.text, 32)


def test_scores_are_those_of_the_files_and_fingerprints_name_the_weights(folder: Path) -> None:
    runtime = Runtime(str(folder), "cpu")
    clip = in_memory(folder, "mine")
    made: list[Agreement] = [
        pickscore.of_clip(clip),
        *(clip_score.of_clip(clip, preset, str(folder)) for preset in ("cosine", "jmhessel", "torchmetrics")),
    ]
    digest = load_clip(str(folder), runtime).network.weights
    for evaluator in made:
        loaded = EVALUATORS[evaluator.name](runtime)
        assert np.array_equal(evaluator.score(IMAGES, PROMPTS), loaded.score(IMAGES, PROMPTS))
        assert evaluator.columns() == loaded.columns()
        assert evaluator.clip.describe()["weights"] == "mine"
        assert evaluator.fingerprint != loaded.fingerprint
        hashed = replace(evaluator.clip, network=replace(evaluator.clip.network, weights=digest))
        assert replace(evaluator, clip=hashed).fingerprint == loaded.fingerprint


def test_the_aesthetic_head_is_put_on_a_clip_in_memory(tmp_path: Path) -> None:
    folder = write_aesthetic(tmp_path / "a")
    loaded = EVALUATORS["aesthetic"](Runtime(str(folder), "cpu"))
    assert isinstance(loaded, aesthetic.Aesthetic)
    made = aesthetic.of_clip(in_memory(folder / "clip", loaded.clip.network.weights), loaded.head)
    assert np.array_equal(made.score(IMAGES, PROMPTS), loaded.score(IMAGES, PROMPTS))
    assert made.fingerprint == loaded.fingerprint


def test_the_logit_scale_is_read_before_the_cast(folder: Path) -> None:
    """In bf16 it would be another number."""
    clip = in_memory(folder, "mine", "bf16")
    assert clip.network.logit_scale == in_memory(folder, "mine").network.logit_scale
    assert clip.network.encode_texts(torch.zeros(1, 16, dtype=torch.long)).dtype == torch.bfloat16


def test_a_hash_is_taken_where_no_name_is_given(folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder)
    assert load_clip(str(folder), Runtime(device="cpu")).network.weights == weights_hash(model)
