"""What is taken off a model's answer, and what is not."""

from __future__ import annotations

import logging

import pytest

from diffpref.captions.answers import captioned, cut_short, perturbed
from diffpref.captions.base import Captioned, Perturbed
from diffpref.captions.templates import instruction, read_template
from diffpref.errors import UserError

CLEANED = [
    "A red dog.",
    '"A red dog."',
    "“A red dog.”",
    "  A red dog.\n",
    "Here is a caption of the picture: A red dog.",
    "Here's the rewritten description:\n\nA red dog.",
    'Sure! Here is a new version: "A red dog."',
    "Sure, here’s the description:\n“A red dog.”",
    "Here you go: A red dog.",
    "Caption: A red dog.",
    "**Caption:** A red dog.",
    "New description: A red dog.",
    "<think>The picture shows\na dog.</think>\n\nA red dog.",
    "A red dog.\n\nNote: I changed the colour.",
    "A red dog.\n\n(I replaced blue by red.)",
    "A red dog.\n\nChanges made:\n- colour\n\nLet me know if you want more!",
    "A red\x00 dog.\ufffd",
]
KEPT = [
    "Here is a red dog: it runs",
    'A "red" dog and a "blue" one',
    '"Red" is written on a "wall"',
    "Sure-footed goats on a cliff",
    "Okay sign: a hand",
    "A note on a fridge",
    "Dog's 'n' cats'",
    "The caption reads: dogs only",
    "A result: 3 to 1 on a board",
    "I changed my mind, a poster",
]


@pytest.mark.parametrize("answer", CLEANED)
def test_what_is_clearly_no_caption_goes(answer):
    assert captioned(answer) == Captioned("A red dog.")
    assert perturbed(answer, "a blue dog") == Perturbed("A red dog.", True)


@pytest.mark.parametrize("answer", KEPT)
def test_what_may_be_the_caption_stays(answer):
    assert captioned(answer) == Captioned(answer)
    assert perturbed(answer, "a dog") == Perturbed(answer, True)


@pytest.mark.parametrize(
    "answer", ["", " \n", "\x00", "<think>well", "<think>hm</think>", "Caption:", "\u00a0"]
)
def test_nothing_is_a_failure(answer):
    assert captioned(answer) == Captioned("", "the model's answer is empty")
    assert perturbed(answer, "a dog") == Perturbed("a dog", False, failure="the model's answer is empty")


def test_what_the_caption_has_itself_is_no_chatter():
    assert perturbed("Caption: a red dog", "Caption: a blue dog").text == "Caption: a red dog"
    assert perturbed('"red dog"', '"blue dog"').text == '"red dog"'
    assert perturbed("a red dog\n\nnote: old", "a dog\n\nnote: new").text == "a red dog\n\nnote: old"


def test_several_lines_are_one_caption_or_none():
    assert captioned("A dog.\n\nIt runs.\nFast.") == Captioned("A dog. It runs. Fast.")
    assert "several lines" in perturbed("1. a red dog\n2. a green dog", "a dog").failure
    assert perturbed("a red dog\na cat", "a dog\na cat").changed


def test_the_same_words_are_no_change():
    assert perturbed('"a  red dog"', "a red  dog") == Perturbed("a red  dog", False)
    assert perturbed("A red dog", "a red dog").changed


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("A dog runs. It is re", "A dog runs."),
        ('He says "no." And the', 'He says "no."'),
        ("a red dog, a blu", "a red dog, a"),
        ("a red dog, blu", "a red dog"),
        ("version 2.5 of th", "version 2.5 of"),
        ("dog", "dog"),
        ("A dog.", "A dog."),
        ("", ""),
    ],
)
def test_an_answer_that_was_cut_ends_where_something_ends(text, whole):
    assert cut_short(text) == whole
    assert captioned(text, complete=False).text == whole


def test_templates_fill_what_they_name_and_nothing_else(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("\ufeff{{x}} {prompt}\n", encoding="utf-8")
    template = read_template(str(file), ("prompt", "tokens"))
    assert template.fill(prompt="{tokens} {0} {", tokens=5) == "{x} {tokens} {0} {"
    assert template.names == {"prompt"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{promt}", "did you mean {prompt}"),
        ("{prompt", "braces"),
        ("{prompt!r}", "placeholder"),
        ("{prompt:>9}", "placeholder"),
        ("{prompt.__class__}", "placeholder"),
        ("{}", "placeholder"),
        ("{0}", "placeholder"),
    ],
)
def test_templates_that_cannot_be_filled(tmp_path, text, said):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(UserError) as raised:
        read_template(str(tmp_path / "t.txt"), ("prompt", "tokens"))
    assert said in str(raised.value)


def test_templates_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 {prompt}")
    with pytest.raises(UserError, match="UTF-8"):
        read_template(str(tmp_path / "latin.txt"), ("prompt",))
    with pytest.raises(UserError, match="cannot be read"):
        read_template(str(tmp_path), ("prompt",))


def test_a_template_without_the_level_is_told(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / "t.txt").write_text("change {caption}")
    instruction(str(tmp_path / "t.txt"), "weak")
    assert "says nothing of the level" in caplog.text
    (tmp_path / "t.txt").write_text("change it, {level}")
    with pytest.raises(UserError, match=r"no \{caption\}"):
        instruction(str(tmp_path / "t.txt"), "weak")
