"""What is taken off a model's answer, and what is not."""

from __future__ import annotations

import logging
import time

import pytest

from diffpref.captions.answers import UNREADABLE, captioned, cut_short, perturbed
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
    "**A red dog.**",
    "*A red dog.*",
    "A **red** dog.",
    "### Caption\n\nA red dog.",
    "**New Description**\n\nA red dog.",
    "**Perturbed caption (weak):**\n> A red dog.",
    "The rewritten description is: A red dog.",
    "Rewritten: A red dog.",
    "The rewritten caption with one wrong detail:\n\n**A red dog.**",
    "Sure!\n\nA red dog.",
    "Of course! I'd be happy to help.\n\nHere is the description\n\nA red dog.",
    "Okay, here's a caption of it:\n```\nA red dog.\n```",
    "1. A red dog.",
    "- A red dog.",
    "Here are three options:\n\n1. A red dog.\n2. A green dog.\n3. A cat.",
    "Here are two versions:\n\n**Option 1:** A red dog.\n**Option 2:** A green dog.",
    "I have rewritten the description as follows:\n\nA red dog.",
    "Rewritten description with one wrong detail: A red dog.",
    "Sure! A red dog.",
    "A red dog.\nA red dog.\nA red dog",
    "A red dog.\n\n(The colour was changed from blue to red.)",
    "A red dog.\n\n**Altered details:**\n- colour",
    "A red dog.\nNote: the colour is wrong.",
    "A red dog.\n---\n*Changes made:*\n\n- **colour**: red\n- nothing else",
    "A red dog.\n\nExplanation: I changed\nthe colour.",
    "A red dog.\n\nThis description keeps the style.\n\nWould you like another?",
    "A red dog. (Note: I changed the colour.)",
    '"A red dog." (I replaced blue by red)',
    "A red dog.\n\nPrompt: a blue dog",
    "I will change the colour.\n\n**Final caption:** A red dog.",
    "<thinking>hm</thinking><reasoning>well</reasoning>A red dog.",
    "[THINK]a dog[/THINK]A red dog.",
    "The user wants a caption.\n</think>\n\nA red dog.",
    "<caption>A red dog.</caption>",
    "<|begin_of_box|>A red dog.<|end_of_box|>",
    '{"caption": "A red dog."}',
    '```json\n{\n  "new_description": "A red dog."\n}\n```',
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
    "12. December, a page of a calendar",
    "2 dogs - one red, one blue",
    "A *red* dog * and a star",
    "Great Wall of China at dusk",
    "Note how red the dog is",
    "I'm sorry dog, a meme (sad)",
    "Original painting of a dog: oil",
    "A dog (the changes of seasons)",
    "Sure enough, a dog",
    "New version of the Mona Lisa: a cat",
    "Prompt delivery, a van",
    "A new caption for an old dog: sit",
]
PERTURBED = [
    ("Original: A blue dog.\nRewritten: A red dog.", "A red dog."),
    ("**Original description:**\nA blue dog.\n\n**New description:**\nA red dog.", "A red dog."),
    ("Before: A blue dog.\nAfter: A red dog.", "A red dog."),
    ("Rewritten: A red dog.\nOriginal: A blue dog.", "A red dog."),
    ("A blue dog.\n\nA red dog.", "A red dog."),
    (
        "Original Description: A blue dog.\n\nRewritten Description (about a third wrong): A red dog.",
        "A red dog.",
    ),
    ("Description: A blue dog.\nNew description: A red dog.", "A red dog."),
]
SEVERAL = [
    "1. a red dog\n2. a green dog",
    "- a red dog\n- a tree",
    "It shows:\n- a red dog\n- a tree",
    "Caption:\n* a red dog\n* a green dog",
]
"""Not surely one caption."""


@pytest.mark.parametrize("answer", CLEANED)
def test_what_is_clearly_no_caption_goes(answer):
    assert captioned(answer) == Captioned("A red dog.")
    assert perturbed(answer, "a blue dog") == Perturbed("A red dog.", True)


@pytest.mark.parametrize("answer", KEPT)
def test_what_may_be_the_caption_stays(answer):
    assert captioned(answer) == Captioned(answer)
    assert perturbed(answer, "a dog") == Perturbed(answer, True)


@pytest.mark.parametrize(("answer", "caption"), PERTURBED)
def test_the_new_caption_is_told_from_the_old(answer, caption):
    assert perturbed(answer, "A blue dog.") == Perturbed(caption, True)


@pytest.mark.parametrize(
    "answer",
    [
        "A red dog.\n\nDescription: A green cat.\nRewritten: A yellow cat.",
        "A red dog.\n\nOriginal: A green cat.\nRewritten: A yellow cat.",
        "Rewritten: A red dog.\nRewritten: A green dog.",
        "A red dog. It runs.\n\nFinal caption: A red dog runs.",
    ],
)
def test_a_label_behind_another_caption_decides_nothing(answer):
    """Small models go on with examples of their own."""
    assert "several lines" in perturbed(answer, "A blue dog.").failure


@pytest.mark.parametrize("answer", SEVERAL)
def test_a_list_that_offers_no_choice_is_no_caption(answer):
    assert captioned(answer).text == ""
    for result in (captioned(answer), perturbed(answer, "a dog")):
        assert result.failure.startswith(f"{UNREADABLE}: it has several lines, a list (")
        assert "red dog / " in result.failure


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m really sorry, but I am not able to describe people.",
        "Sorry, I cannot do that.",
        "I cannot assist with this request.",
        "Unfortunately, I can't see the picture you mention.",
        "As an AI, I do not draw.",
    ],
)
def test_a_refusal_is_no_caption(answer):
    assert captioned(answer).failure == f"{UNREADABLE}: it refuses ({answer})"
    assert perturbed(answer, "a dog").failure == captioned(answer).failure
    assert perturbed(answer, answer.upper()).changed  # a caption like that, on a poster


@pytest.mark.parametrize(
    ("answer", "source", "whole"),
    [
        ("A cat sits.\nThe mat is blue.", "A dog sits. The mat is red.", True),
        ("A cat sits.\n\nThe mat is blue.", "A dog sits. The mat is red.", True),
        ("A red cat.\nA green cat.", "A dog sits.", False),
        ("A red cat\na green cat", "a dog", False),
        (
            "a portrait of a cat in the style of an old\nmaster, oil",
            "a portrait of a dog in the style of",
            True,
        ),
        ("a portrait of a cat in the style of an old\nA dog", "a portrait of a dog in the style of", False),
        ("A cat sits.\nThe mat is blue, and there are ten other cats.", "A dog sits. A mat.", False),
    ],
)
def test_lines_are_one_caption_where_they_are_surely_one(answer, source, whole):
    result = perturbed(answer, source)
    assert result.changed == whole
    assert (result.text == " ".join(answer.split())) == whole
    assert ("several lines" in result.failure) == (not whole)


@pytest.mark.parametrize("answer", ['{"a": 1}', '{"caption": 5}', '{"caption": "a", "description": "b"}'])
def test_json_without_one_caption(answer):
    assert "JSON" in captioned(answer).failure


@pytest.mark.parametrize(
    "answer",
    [
        "Sure!",
        "Here is the caption:",
        "**Caption:**",
        "[THINK]well",
        "```\n```",
        "<think>a</think>\n",
        "",
        " \n",
        "\x00",
        "<think>well",
        "<think>hm</think>",
        "Caption:",
        "\u00a0",
    ],
)
def test_nothing_is_a_failure(answer):
    assert captioned(answer) == Captioned("", "the model's answer is empty")
    assert perturbed(answer, "a dog") == Perturbed("a dog", False, failure="the model's answer is empty")


def test_what_the_caption_has_itself_is_no_chatter():
    assert perturbed("Caption: a red dog", "Caption: a blue dog").text == "Caption: a red dog"
    assert perturbed('"red dog"', '"blue dog"').text == '"red dog"'
    assert perturbed("a red dog\n\nnote: old", "a dog\n\nnote: new").text == "a red dog\n\nnote: old"
    assert perturbed("1. a red dog", "1. a blue dog").text == "1. a red dog"
    assert perturbed("**red** dog", "**blue** dog").text == "**red** dog"
    assert perturbed("a red dog (note: old)", "a dog (note: new)").text == "a red dog (note: old)"
    assert perturbed('{"caption": "red"}', '{"caption": "blue"}').text == '{"caption": "red"}'


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


@pytest.mark.parametrize("text", ["**a ", "> ", "1. ", "<caption>", "new ", '"', "a\n", "Original: a\n"])
def test_time_grows_with_the_length_of_an_answer(text):
    """Not with its square: a model in a loop writes one thing until it is stopped."""

    def steps(length: int) -> float:
        answer = text * (length // len(text))
        times = []
        for _ in range(3):
            start = time.process_time()
            captioned(answer)
            perturbed(answer, "a dog")
            times.append(time.process_time() - start)
        return min(times)

    assert steps(16_000) < 40 * steps(2_000) + 0.02
    assert "characters" in captioned("word " * 4_000).failure


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
