"""The shipped model and pairs: what users get, measured on small samples of what the cards claim."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffpref.config import ColumnsConfig
from diffpref.data.pairs import open_pairs
from diffpref.paths import resolve_existing
from diffpref.suites import load_suite
from diffpref.tiny.grammar import is_held_out, parse_prompt
from diffpref.tiny.oracle import judge
from diffpref.tiny.pairs import INDISTINCT, TEMPERATURE, prefer
from diffpref.tiny.suites import DEMO, FULL
from diffpref.tiny.vae import reconstruction_accuracy


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(resolve_existing("tiny:model", "small model"))


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, object]]:
    return pq.read_table(resolve_existing("tiny:pairs/train.parquet", "pairs")).to_pylist()


def test_assets_fit_in_25_megabytes() -> None:
    folder = Path(resolve_existing("tiny:model", "small model")).parent
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 25e6
    assert not [f.name for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_plain_diffusers_loads_it_in_one_precision(pipeline: StableDiffusionPipeline) -> None:
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"
    assert pipeline.vae.config.latent_channels == 4
    assert pipeline.vae_scale_factor == 8
    assert pipeline.tokenizer.model_max_length == 77
    schedule = pipeline.scheduler.config
    assert (schedule.beta_start, schedule.beta_end) == (0.00085, 0.012)
    assert schedule.beta_schedule == "scaled_linear"
    assert schedule.prediction_type == "epsilon"


def test_any_text_tokenizes(pipeline: StableDiffusionPipeline) -> None:
    tokenizer = pipeline.tokenizer
    for text in ("a red circle", "an astronaut on a horse, 4k, 🎉", "naïve coöperation"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids[1:-1]
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert len(tokenizer("a red circle left of a blue square")["input_ids"]) == 10  # a token a word


def test_autoencoder_keeps_what_the_oracle_reads(pipeline: StableDiffusionPipeline) -> None:
    assert reconstruction_accuracy(pipeline.vae, 256) >= 0.975  # 99 % of 5,000, and room for chance


def test_pairs_have_the_pick_a_pic_columns(pairs: list[dict[str, object]]) -> None:
    wanted = {"caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "are_different"}
    assert wanted | {"model_0", "model_1", "caption_0", "caption_1"} <= set(pairs[0])
    assert len(pairs) >= 3000
    labels = Counter(row["label_0"] for row in pairs)
    assert set(labels) == {0.0, 0.5, 1.0}
    assert 0.4 < labels[1.0] / (labels[1.0] + labels[0.0]) < 0.6  # no side is favoured
    assert len({row["model_0"] for row in pairs}) == 3


def test_held_out_pairs_and_suites_share_no_prompt_with_training(pairs: list[dict[str, object]]) -> None:
    held_out = pq.read_table(resolve_existing("tiny:pairs/validation.parquet", "pairs"), columns=["caption"])
    later = set(held_out["caption"].to_pylist())
    assert held_out.num_rows >= 300
    for name, counts in (("tiny", FULL), ("tiny-demo", DEMO)):
        suite = load_suite(name)
        assert Counter(prompt.kind for prompt in suite.prompts) == counts
        assert len({prompt.text for prompt in suite.prompts}) == len(suite.prompts)
        later |= {prompt.text for prompt in suite.prompts}
    assert not later & {row["caption"] for row in pairs}
    assert all(is_held_out(prompt) for prompt in later)


def test_labels_follow_the_judges_utility(pairs: list[dict[str, object]]) -> None:
    """The winner has the higher utility as often as Bradley-Terry says, and captions say what is shown."""
    agree, expected, judged = 0, 0.0, 0
    for row in pairs[:300]:
        first, second = (
            judge(Image.open(io.BytesIO(row[f"jpg_{k}"])), str(row["caption"]))  # type: ignore[arg-type]
            for k in (0, 1)
        )
        assert row["caption_0"] == first.caption
        assert row["caption_1"] == second.caption
        gap = first.utility - second.utility
        assert (row["label_0"] == 0.5) == (abs(gap) < INDISTINCT)
        if row["label_0"] != 0.5:
            judged += 1
            agree += (gap > 0) == (row["label_0"] == 1.0)
            expected += 1 / (1 + np.exp(-abs(gap) / TEMPERATURE))
    assert abs(agree - expected) < 4 * np.sqrt(judged) / 2


def test_preference_coin_by_hand() -> None:
    """Utilities one temperature apart: the better wins with probability 1 / (1 + 1/e) = 0.731."""
    red = blank = judge(Image.new("RGB", (64, 64)), "a red circle")
    assert prefer(red, blank, np.random.default_rng(0)) == 0.5
    better = type(red)(**{**red.__dict__, "utility": red.utility + TEMPERATURE})
    wins = [prefer(better, blank, np.random.default_rng(seed)) for seed in range(2000)]
    assert np.mean(wins) == pytest.approx(0.731, abs=0.04)


def test_pairs_open_as_training_data() -> None:
    table = open_pairs("tiny:pairs/train.parquet", ColumnsConfig(), "dual")
    for index in (0, len(table) - 1):
        pair = table.load(index)
        assert pair.winner_image.size == pair.loser_image.size == (64, 64)
        assert parse_prompt(pair.winner_caption).total >= 1
