"""Perturbed captions by a T5 (DIPPER's way) and by a chat model: tiny ones of the real classes."""

from __future__ import annotations

import logging

import pytest

from diffpref.captions import PERTURBERS, Perturbed
from diffpref.captions.dipper import DIPPER, DipperPerturber, _Work
from diffpref.errors import UserError
from diffpref.language_models import loading
from tests import caption_models
from tests.caption_inputs import prompts

LONG = "A dog runs. It is red! A cat sits. It said “no.” (Snow) falls. Is it 3 pm? Yes. Night comes."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("perturbers")
    return {
        "dipper": caption_models.save_t5(root / "t5"),
        "transformers": caption_models.save_llama(root / "llama"),
    }


def perturber(folders, name, **settings):
    return PERTURBERS[name](model=str(folders[name]), **{"max_new_tokens": 16, **settings})


@pytest.mark.parametrize("name", ["dipper", "transformers"])
@pytest.mark.parametrize("greedy", [False, True])
def test_batches_equal_single_captions_in_any_order(folders, name, greedy):
    settings = {"temperature": 0.0, "top_p": 1.0} if greedy else {}
    perturb = perturber(folders, name, batch_size=4, **settings)
    captions = [*prompts(5), LONG]
    rows = range(50, 56)
    together = perturb(captions, rows)
    assert all(result.changed != bool(result.failure) for result in together)
    assert sum(result.changed for result in together) >= 4  # random weights write several lines now and then
    assert len({result.text for result in together}) == 6
    assert together == [perturb([c], [r])[0] for c, r in zip(captions, rows, strict=True)]
    assert together[::-1] == perturb(captions[::-1], rows[::-1])


@pytest.mark.parametrize("name", ["dipper", "transformers"])
def test_level_seed_and_row_choose_the_words(folders, name):
    captions = prompts(5)
    base = perturber(folders, name)(captions, range(5))
    assert base == perturber(folders, name)(captions, range(5))
    for other in (
        perturber(folders, name, seed=1)(captions, range(5)),
        perturber(folders, name, level="strong")(captions, range(5)),
        perturber(folders, name)(captions, range(5, 10)),
    ):
        assert sum(a.text != b.text for a, b in zip(base, other, strict=True)) >= 3


@pytest.mark.parametrize("name", ["dipper", "transformers"])
def test_what_has_no_words_stays(folders, name):
    blank = ["", " ", "\n\t", "\u200b", "</s>"]
    assert perturber(folders, name)(blank, range(5)) == [Perturbed(text, False) for text in blank]
    assert perturber(folders, name)([], []) == []


@pytest.mark.parametrize(("level", "code"), [("weak", 60), ("medium", 40), ("strong", 20)])
def test_dipper_reads_what_its_authors_give_it(folders, monkeypatch, level, code):
    """Codes of likeness, DCPO's instruction, then three sentences at a time after what became of those
    before: what the release of DCPO (arXiv 2502.06023) passes to DIPPER as prefix and text."""
    seen = []
    fill = type(perturber(folders, "dipper")._template).fill

    def watched(template, **values):
        seen.append(" ".join(fill(template, **values).split()))
        return fill(template, **values)

    monkeypatch.setattr(type(perturber(folders, "dipper")._template), "fill", watched)
    (result,) = perturber(folders, "dipper", level=level)([f"  {LONG}\n"], [0])
    head = f"lexical = {code}, order = 100 Paraphrase and perturb the following image caption."
    assert seen[0] == f"{head} <sent> A dog runs. It is red! A cat sits. </sent>"
    first = seen[1].removeprefix(f"{head} ").partition(" <sent> ")[0]
    assert first
    assert result.text.startswith(first)
    assert seen[1] == f"{head} {first} <sent> It said “no.” (Snow) falls. Is it 3 pm? </sent>"
    assert seen[2].startswith(f"{head} {first} ")
    assert seen[2].endswith("<sent> Yes. Night comes. </sent>")
    second = seen[2].removeprefix(f"{head} {first} ").partition(" <sent> ")[0]
    assert result.text.startswith(f"{first} {second}")


def test_the_instruction_stays_where_context_must_go(folders):
    """Of what was rewritten the oldest is left out where the model reads no more, the instruction never."""
    perturb = perturber(folders, "dipper", sentences=1)
    item = _Work(0, ["First one.", "Second one.", "A third."], 0, done=["word " * 400, "near " * 60])
    read = perturb._tokenizer.decode(perturb._ids(item, 2))
    assert "word" not in read
    assert "near near" in read
    assert "100 Paraphrase and perturb the following image caption. near" in read


def test_dipper_itself_is_the_default_and_has_its_settings():
    perturb = DipperPerturber()
    assert (perturb.model, perturb.top_p, perturb.sentences, perturb.temperature) == (DIPPER, 0.75, 3, 1.0)
    with pytest.raises(UserError, match=r"google/t5-v1_1-xxl|dipper-paraphraser-xxl"):
        perturb(["a dog"], [0])  # offline here


def test_a_paraphrase_is_never_much_longer_than_its_caption(folders):
    """Random weights rarely stop: twice the tokens and 16 more are the end."""
    perturb = perturber(folders, "dipper", max_new_tokens=256)
    tokenizer = perturb._tokenizer
    for caption, result in zip(prompts(6), perturb(prompts(6), range(6)), strict=True):
        most = 2 * len(tokenizer(caption)["input_ids"]) + 16
        assert 0 < len(tokenizer(result.text)["input_ids"]) <= most + 2


def test_captions_that_are_too_long_are_failures(folders):
    long, short = perturber(folders, "dipper")(["dog " * 600, "a dog"], [0, 1])
    assert long == Perturbed("dog " * 600, False, failure=long.failure)
    assert "the model reads 512" in long.failure
    assert short.changed


def test_other_t5s_take_a_template_of_their_own(folders, tmp_path, caplog):
    file = tmp_path / "plain.txt"
    file.write_text("paraphrase: {caption}")
    caplog.set_level(logging.WARNING)
    (result,) = perturber(folders, "dipper", template=str(file))(["a dog"], [0])
    assert result.changed
    assert "says nothing of the level" in caplog.text
    caplog.clear()
    file.write_text("paraphrase {lexical}: {caption}")
    perturber(folders, "dipper", template=str(file))
    assert caplog.text == ""
    file.write_text("paraphrase")
    with pytest.raises(UserError, match="caption"):
        perturber(folders, "dipper", template=str(file))


def test_an_unchanged_paraphrase_is_called_unchanged(folders, monkeypatch):
    """Only spaces differ: the caption itself comes back."""
    tokenizer = perturber(folders, "dipper")._tokenizer
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, tokens, **_: "a red dog.")
    assert perturber(folders, "dipper")(["a  red dog. "], [0]) == [Perturbed("a  red dog. ", False)]


def test_the_chat_model_is_told_what_the_template_says(folders, tmp_path):
    (tmp_path / "weak.txt").write_text("Change {caption} a bit ({level}).")
    perturb = perturber(folders, "transformers", level="weak", template=str(tmp_path / "{level}.txt"))
    tokenizer = perturb._tokenizer
    text = tokenizer.decode(perturb._ids("a {dog}"))
    assert text == "<s>user: Change a {dog} a bit (weak).assistant:"
    assert perturb.provenance().level == "weak"
    with pytest.raises(UserError, match=r"strong\.txt"):
        perturber(folders, "transformers", level="strong", template=str(tmp_path / "{level}.txt"))


def test_models_of_the_wrong_kind(folders, tmp_path):
    with pytest.raises(UserError, match="no T5"):
        PERTURBERS["dipper"](model=str(folders["transformers"]))(["a"], [0])
    with pytest.raises(UserError, match="no chat template"):
        PERTURBERS["transformers"](model=str(folders["dipper"]))(["a"], [0])
    with pytest.raises(UserError, match="model not found"):
        PERTURBERS["transformers"](model=str(tmp_path / "none"))(["a"], [0])
    with pytest.raises(UserError, match="tokenizer not found"):
        PERTURBERS["dipper"](model=str(folders["dipper"]), tokenizer=str(tmp_path / "none"))(["a"], [0])


def test_both_models_stay_loaded(folders):
    loading.shared_network.cache_clear()
    for _ in range(2):
        for name in folders:
            perturber(folders, name)(["a dog"], [0])
    assert loading.shared_network.cache_info().misses == 2
