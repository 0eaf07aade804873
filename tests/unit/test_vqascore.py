"""VQAScore against plain calls of transformers, and what a model must have for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import ImageOps
from safetensors.torch import load_file, save_file

from diffpref.errors import UserError
from diffpref.evaluators import Runtime, load_evaluators
from diffpref.evaluators.vqascore import VqaScore, load
from tests.caption_models import save_blip, save_florence, save_llama, save_llava
from tests.clips import picture
from tests.vqa_models import save_instructblip, with_answers, write_llava

PAIRS = [
    (picture(40, 64), "a red circle"),
    (picture(64, 64), "two dogs and a cat"),
    (picture(97, 30), ""),
    (picture(64, 64, 5), "a {} red 'circle' \"left\" of a blue square, photographed at dawn"),
]
IMAGES, PROMPTS = [image for image, _ in PAIRS], [prompt for _, prompt in PAIRS]


def asked(prompt: str) -> str:
    return f'Does this figure show "{prompt}"? Please answer yes or no.'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("vqa") / "tiny-llava")


@pytest.fixture(scope="module")
def evaluator(folder: Path) -> VqaScore:
    return load(Runtime(str(folder)))


def test_the_passes_of_a_call_are_fetched_together(evaluator: VqaScore, fetched: list[torch.Size]) -> None:
    evaluator.score(IMAGES, PROMPTS)
    assert [shape for shape in fetched if len(shape) == 2] == [(len(IMAGES), 2)]  # others are of a processor


def of_llava(network: Any, processor: Any, image: Any, prompt: str) -> torch.Tensor:
    text = f"<s>user: <image>\n{asked(prompt)}assistant:"
    inputs = processor(text=text, images=image, return_tensors="pt", add_special_tokens=False)
    return network(**inputs).logits[0, -1]


def of_blip(network: Any, processor: Any, image: Any, prompt: str) -> torch.Tensor:
    inputs = processor(text=asked(prompt), images=image, return_tensors="pt")
    tokens = inputs["input_ids"][:, :-1]  # the answer follows the question, before the end token
    tokens[0, 0] = network.config.text_config.bos_token_id
    seen = network.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
    return network.text_decoder(input_ids=tokens, encoder_hidden_states=seen).logits[0, -1]


def of_instructblip(network: Any, processor: Any, image: Any, prompt: str) -> torch.Tensor:
    inputs = processor(text=asked(prompt), images=image, return_tensors="pt")
    return network(**inputs, decoder_input_ids=torch.tensor([[0]])).logits[0, -1]


def of_florence(network: Any, processor: Any, image: Any, prompt: str) -> torch.Tensor:
    inputs = processor(text=asked(prompt), images=image, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    return network(**inputs, decoder_input_ids=torch.tensor([[2, 1]])).logits[0, -1]


def save_florence_as_published(folder: Path) -> Path:
    """Its answers begin with <s>, which generation forces."""
    save_florence(folder)
    settings = transformers.GenerationConfig.from_pretrained(folder)
    settings.forced_bos_token_id = 1
    settings.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("save", "words", "plain"),
    [
        (save_llava, ("Yes", "No"), of_llava),
        (save_blip, ("Yes", "No"), of_blip),
        (save_instructblip, ("yes", "no"), of_instructblip),
        (save_florence_as_published, ("Yes", "No"), of_florence),
    ],
)
def test_equals_a_plain_call(
    save: Callable[[Path], Path], words: tuple[str, str], plain: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    """The softmax over the whole vocabulary after the question, in models of four forms."""
    folder = with_answers(save, tmp_path / "model", words)
    network = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    tokens = processor.tokenizer.convert_tokens_to_ids(list(words))
    with torch.no_grad():
        shares = [plain(network, processor, *pair).double().softmax(0)[tokens].numpy() for pair in PAIRS]
    scores, details = load(Runtime(str(folder))).explain(IMAGES, PROMPTS)
    expected = np.array(shares)
    assert expected.std(axis=0).min() > 1e-6  # the pairs do differ
    np.testing.assert_allclose(scores, expected[:, 0], rtol=1e-4, atol=0)
    np.testing.assert_allclose(details["no"], expected[:, 1], rtol=1e-4, atol=0)


def test_rows_of_a_pass_change_scores_by_rounding_alone(evaluator: VqaScore, folder: Path) -> None:
    """As on a GPU, where pairs of one shape go together."""
    images, prompts = IMAGES + [ImageOps.flip(image) for image in IMAGES], PROMPTS * 2
    expected = evaluator.score(images, prompts)
    together = load(Runtime(str(folder)))
    together.rows = 3
    np.testing.assert_allclose(together.score(images, prompts), expected, rtol=1e-5)


def test_equal_pairs_cost_one_pass(evaluator: VqaScore, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    once = VqaScore._probabilities
    monkeypatch.setattr(
        VqaScore, "_probabilities", lambda self, *given: passes.append(given) or once(self, *given)
    )
    image, other = picture(64, 64), picture(64, 64, 1)
    scores = evaluator.score([image, other, image.copy(), image], ["a", "a", "a", "b"])
    assert len(passes) == 3
    assert scores[0] == scores[2]
    assert len({*scores.tolist()}) == 3


def test_says_whose_score_it_is(evaluator: VqaScore) -> None:
    column = evaluator.columns()["vqascore"]
    assert column.label == "VQAScore (tiny-llava)"
    assert "CLIP-FlanT5" in column.meaning


def test_control_tokens_in_a_prompt_are_blanks(evaluator: VqaScore) -> None:
    image = picture(64, 64)
    scores = evaluator.score([image] * 2, ["a red</s>circle <image>", "a red circle  "])
    assert scores[0] == scores[1]


def test_a_vocabulary_without_yes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'Yes' is no single token"):
        load(Runtime(str(save_llava(tmp_path / "model"))))


def test_a_model_that_reads_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image-text-to-text model"):
        load_evaluators(["vqascore"], {"vqascore": Runtime(str(save_llama(tmp_path / "model")))})


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = write_llava(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    del state[next(name for name in state if name.endswith("lm_head.weight"))]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of its weights"):
        load(Runtime(str(folder)))


def test_a_prompt_beyond_the_table_of_positions_is_refused(tmp_path: Path) -> None:
    evaluator = load(Runtime(str(with_answers(save_blip, tmp_path / "model"))))
    with pytest.raises(UserError, match="too long") as error:
        evaluator.score([picture(64, 64)], ["a red circle " * 100])
    assert "256" in str(error.value)


def test_what_a_model_cannot_take_is_named(tmp_path: Path) -> None:
    """InstructBLIP's query transformer has a table of positions of its own, of 256 here."""
    evaluator = load(Runtime(str(with_answers(save_instructblip, tmp_path / "model", ("yes", "no")))))
    with pytest.raises(UserError, match="fails on an image of 40x64 pixels") as error:
        evaluator.score([picture(40, 64)], ["a red circle " * 100])
    assert error.value.why
