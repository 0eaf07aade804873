"""HPSv3 against golden numbers of the published package, made by golden/make_hps_v3.py."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from diffpref.errors import UserError
from diffpref.evaluators import Runtime
from diffpref.evaluators.hps_v3 import HpsV3, load, patches, resized
from tests.clips import picture
from tests.hps_v3_models import GOLDEN, word_tokenizer, write_hps_v3
from tests.parity import hps_v3_cases as small

CASES = small.cases()
FILE = "HPSv3.safetensors"


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> HpsV3:
    """Its vocabulary is of bytes, so that every sign of what it reads counts."""
    folder = write_hps_v3(tmp_path_factory.mktemp("hps") / "bytes", tokenizer=small.byte_tokenizer())
    return load(Runtime(weights=str(folder)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hps_v3(tmp_path / "words")


def test_outputs_equal_the_published_package(evaluator: HpsV3) -> None:
    """Mean and deviation; the package read four pairs at a time, padded."""
    images, prompts = zip(*CASES.values(), strict=True)
    scores, details = evaluator.explain(images, prompts)
    expected = np.array([GOLDEN["cases"][name]["output"] for name in CASES])
    assert (np.std(expected, axis=0) > 0.01).all()  # the cases do differ
    np.testing.assert_allclose(scores, expected[:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(details["sigma"], np.exp(expected[:, 1]), rtol=0, atol=1e-5)


def test_inputs_equal_the_published_package(evaluator: HpsV3) -> None:
    for name, (image, prompt) in CASES.items():
        golden = GOLDEN["cases"][name]
        wide, high = resized(image.size)
        assert [1, high // 14, wide // 14] == golden["grid"]
        assert len(evaluator.tokens(prompt, (wide, high))) == golden["tokens"]
        sums = patches(image)[::97, ::101].astype(np.float64).sum(axis=1)[:4]
        assert sums.tolist() == golden["pixels"]


def test_the_passes_of_a_call_are_fetched_together(evaluator: HpsV3, fetched: list[torch.Size]) -> None:
    evaluator.score([picture(64, 64), picture(30, 90), picture(64, 64)], ["a red fox", "a dog", "at dawn"])
    assert fetched == [(3, 2)]


def test_rows_of_a_pass_change_scores_by_rounding_alone(folder: Path) -> None:
    """As on a GPU, where pairs of one shape go together."""
    images = [picture(64, 64, seed) for seed in range(5)] + [picture(30, 90)]
    prompts = ["a red fox", "a red heron", "a red fox", "by the river at dawn", "a red fox", "a red fox"]
    alone, together = load(Runtime(weights=str(folder))), load(Runtime(weights=str(folder)))
    together.rows = 4
    np.testing.assert_allclose(together.score(images, prompts), alone.score(images, prompts), atol=1e-6)


def test_equal_pairs_cost_one_pass(evaluator: HpsV3, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    once = HpsV3._outputs
    monkeypatch.setattr(HpsV3, "_outputs", lambda self, *given: passes.append(given) or once(self, *given))
    image, other = picture(64, 64), picture(64, 64, 1)
    scores = evaluator.score([image, other, image.copy(), image], ["a", "a", "a", "b"])
    assert len(passes) == 3
    assert scores[0] == scores[2]
    assert len({*scores.tolist()}) == 3


def test_control_tokens_in_a_prompt_are_blanks(evaluator: HpsV3) -> None:
    image = picture(64, 64)
    scores = evaluator.score([image] * 2, ["a<|Reward|>cat<|image_pad|>", "a cat "])
    assert scores[0] == scores[1]


def test_images_of_any_reasonable_form() -> None:
    """About 448 x 448 pixels of the same proportions, in tokens of 28 x 28."""
    for width in (1, 7, 27, 28, 448, 449, 1000, 5000):
        for height in (width, 3 * width, 50 * width, 200 * width):
            wide, high = resized((width, height))
            assert wide % 28 == high % 28 == 0
            assert wide >= 28
            assert high >= 28
            assert abs(math.log(wide * high / 448**2)) < 0.7
    with pytest.raises(UserError, match="1x201"):
        resized((1, 201))


def test_bf16_weights_and_a_missing_language_head(folder: Path, tmp_path: Path) -> None:
    """The published file is in bf16; the head of the language model takes no part in scores."""
    rounded = {name: value.bfloat16() for name, value in load_file(folder / FILE).items()}
    scores = []
    for number, state in enumerate((rounded, {name: value.float() for name, value in rounded.items()})):
        place = write_hps_v3(tmp_path / str(number))
        state.pop("lm_head.weight")
        save_file(state, place / FILE)
        scores.append(load(Runtime(weights=str(place))).score([picture(64, 64)], ["a red fox"]))
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("missing", "missing model.norm.weight\n"),
        ("unexpected", "unexpected other.weight"),
        ("shape", r"rm_head.3.weight: \[15, 1024\], expected \[16, 1024\]"),
        ("another", "unexpected blip.weight"),
    ],
)
def test_weights_of_something_else(folder: Path, change: str, told: str) -> None:
    state = load_file(folder / FILE)
    if change == "missing":
        del state["model.norm.weight"]
    elif change == "unexpected":
        state["other.weight"] = torch.zeros(2)
    elif change == "shape":
        state["rm_head.3.weight"] = torch.zeros(15, 1024)
    else:
        state = {"blip.weight": torch.zeros(2)}
    save_file(state, folder / FILE)
    with pytest.raises(UserError, match=told) as error:
        load(Runtime(weights=str(folder)))
    assert FILE in str(error.value)


def test_a_vocabulary_of_something_else(folder: Path, tmp_path: Path) -> None:
    other = small.byte_tokenizer()
    assert other.get_vocab_size() != word_tokenizer().get_vocab_size()
    other.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="vocabulary does not fit"):
        load(Runtime(weights=str(folder)))


def test_settings_of_something_else(folder: Path) -> None:
    transformers.CLIPConfig().save_pretrained(folder)
    with pytest.raises(UserError, match="'clip'"):
        load(Runtime(weights=str(folder)))


def test_settings_that_are_nowhere_offline(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(UserError) as error:
            load(Runtime(weights=str(folder / FILE)))
        assert "hf download Qwen/Qwen2-VL-7B-Instruct" in str(error.value)
        (folder / name).write_bytes(content)
