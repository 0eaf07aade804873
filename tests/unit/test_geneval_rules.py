"""GenEval's prompts and rules, on detections made by hand."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from diffpref.errors import UserError
from diffpref.evaluators.geneval.grammar import Claim, Thing, parse_prompt
from diffpref.evaluators.geneval.rules import Detection, judge, kept, relations, to_colour
from diffpref.evaluators.geneval.suite import COUNTS, claims, suite_text
from diffpref.evaluators.geneval.words import COLORS, KINDS, NAMES, from_detector
from diffpref.suites import load_suite

SUITES = Path(__file__).parents[2] / "eval" / "suites"


def seen(name: str, score: float = 0.95, left: float = 0, top: float = 0, side: float = 10) -> Detection:
    return Detection(name, score, (left, top, left + side, top + side), np.ones((1, 1), np.bool_))


def verdict(prompt: str, *detections: Detection, **colors: str) -> tuple[bool, str]:
    claim = parse_prompt(prompt)
    found = judge(claim, kept(detections, claim), colors)
    return found.correct, "; ".join(found.reasons)


@pytest.mark.parametrize(
    ("prompt", "claim"),
    [
        ("a photo of a bench", Claim("single_object", (Thing("bench"),))),
        ("a photo of an orange", Claim("single_object", (Thing("orange"),))),
        ("a photo of an orange cell phone", Claim("colors", (Thing("cell phone", color="orange"),))),
        ("  A Photo of a  Computer Mouse. ", Claim("single_object", (Thing("computer mouse"),))),
        ("a photo of three buses", Claim("counting", (Thing("bus", 3),))),
        ("a photo of two benchs", Claim("counting", (Thing("bench", 2),))),  # as the published list spells it
        ("a photo of four knifes", Claim("counting", (Thing("knife", 4),))),
        ("a photo of four knives", Claim("counting", (Thing("knife", 4),))),
        ("a photo of two sheep", Claim("counting", (Thing("sheep", 2),))),
        ("a photo of a tie and a hot dog", Claim("two_object", (Thing("tie"), Thing("hot dog")))),
        (
            "a photo of a tv remote below an apple",
            Claim("position", (Thing("tv remote"), Thing("apple")), "below"),
        ),
        (
            "a photo of a dog right of a cat",
            Claim("position", (Thing("dog"), Thing("cat")), "right of"),
        ),
        (
            "a photo of a red car and an orange orange",
            Claim("color_attr", (Thing("car", color="red"), Thing("orange", color="orange"))),
        ),
    ],
)
def test_prompts_of_the_six_tasks_are_read(prompt: str, claim: Claim) -> None:
    assert parse_prompt(prompt) == claim


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("", "''"),
        ("a photo of a unicorn", "'a unicorn'"),
        ("a photo of a crimson car", "'a crimson car'"),
        ("a photo of two dogs and a cat", "'two dogs'"),
        ("a photo of one dog", "'one dog'"),
        ("a photo of twelve dogs", "'twelve dogs'"),
        ("a photo of a dog, a cat and a cow", "'a dog, a cat'"),
        ("a photo of a red dog left of a blue cat", "both a colour and a position"),
        ("a photo of a red dog and a cat", "the other has none"),
        ("a photo of a dog and a dog", "one class"),
        ("astronaut riding a horse, 8k", "'astronaut riding a horse, 8k'"),
    ],
)
def test_any_other_prompt_is_refused_with_the_reason(prompt: str, why: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_prompt(prompt)
    assert why in raised.value.why
    assert "GenEval-style" in raised.value.fix


def test_every_claim_reads_back_from_its_sentence() -> None:
    singles = [Claim("single_object", (Thing(name),)) for name in NAMES]
    counts = [Claim("counting", (Thing(name, n),)) for name, n in product(NAMES, range(2, 11))]
    colored = [Claim("colors", (Thing(name, color=color),)) for name, color in product(NAMES, COLORS)]
    dealt = [claim for kind in KINDS for claim in claims(kind)]
    for claim in (*singles, *counts, *colored, *dealt):
        assert parse_prompt(str(claim)) == claim


def test_detectors_labels_are_matched_by_their_letters() -> None:
    assert len(NAMES) == len(set(NAMES)) == 80
    names = ("mouse", "Traffic_Light", "trafficlight", "tvmonitor", "hair dryer", "person")
    assert [from_detector(name) for name in names] == [
        "computer mouse", "traffic light", "traffic light", "tv", "hair drier", "person",
    ]  # fmt: skip
    assert from_detector("grass-merged") is None


def test_one_object_is_enough_and_more_do_not_hurt() -> None:
    assert verdict("a photo of a dog", seen("dog", 0.31)) == (True, "")
    assert verdict("a photo of a dog", *[seen("dog")] * 3, seen("cat")) == (True, "")
    assert verdict("a photo of a dog", seen("cat")) == (False, "no dog")
    assert verdict("a photo of a dog and a cat", seen("cat"), seen("dog")) == (True, "")
    assert verdict("a photo of a dog and a cow", seen("cat")) == (False, "no dog; no cow")


def test_thresholds_are_exclusive_and_higher_for_counting() -> None:
    assert not verdict("a photo of a dog", seen("dog", 0.3))[0]
    two = seen("dog", 0.91), seen("dog", 0.92)
    assert verdict("a photo of two dogs", *two, seen("dog", 0.9)) == (True, "")
    assert verdict("a photo of two dogs", two[0], seen("dog", 0.9)) == (False, "1 of 2 dogs")


def test_counting_is_exact() -> None:
    assert verdict("a photo of three sheep", *[seen("sheep")] * 3) == (True, "")
    assert verdict("a photo of three sheep", *[seen("sheep")] * 4) == (False, "4 of 3 sheep")
    assert verdict("a photo of two knives") == (False, "no knife")
    assert verdict("a photo of two knives", *[seen("knife")] * 2, *[seen("fork")] * 5)[0]


def test_sixteen_of_a_class_are_kept_the_most_confident_first_and_equal_ones_in_order() -> None:
    claim = parse_prompt("a photo of a dog")
    rising = [seen("dog", 0.5 + n / 100, left=n) for n in range(20)]
    found = kept([*rising, seen("cat", 0.2)], claim)
    assert set(found) == {"dog"}
    assert [d.box[0] for d in found["dog"]] == list(range(19, 3, -1))
    assert [d.box[0] for d in kept([seen("dog", 0.5, left=n) for n in (7, 3, 5)], claim)["dog"]] == [7, 3, 5]


def test_the_most_confident_object_must_have_the_colour() -> None:
    claim = parse_prompt("a photo of a red car and a blue dog")
    cars = seen("car", 0.6, left=1), seen("car", 0.8, left=2)
    found = kept([*cars, seen("dog"), seen("cat")], claim)
    assert to_colour(claim, found) == [cars[1], found["dog"][0]]
    assert to_colour(claim, kept(cars, claim)) == [cars[1]]
    assert to_colour(parse_prompt("a photo of a car"), found) == []
    prompt = "a photo of a red car and a blue dog"
    assert verdict(prompt, *cars, seen("dog"), car="red", dog="blue") == (True, "")
    assert verdict(prompt, *cars, seen("dog"), car="red", dog="black") == (False, "dog is black, not blue")
    assert verdict(prompt, *cars, car="blue") == (False, "car is blue, not red; no dog")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # two boxes of side 10: the distance d of centres must satisfy (d - 0.1 * 20) / d > 0.5, so d > 4
        ((0, 0, 10, 10), (4, 0, 14, 10), set()),
        ((0, 0, 10, 10), (5, 0, 15, 10), {"left of"}),
        ((5, 0, 15, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 4, 10, 14), set()),
        ((0, 0, 10, 10), (0, 5, 10, 15), {"above"}),
        ((0, 5, 10, 15), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (2, 2, 12, 12), set()),  # within 0.1 of both extents: no direction at all
        ((3, 3, 7, 7), (0, 0, 10, 10), set()),  # the same centre
        # points 30 and 40 apart: direction (0.6, 0.8), both above one half
        ((0, 0, 0, 0), (30, 40, 30, 40), {"left of", "above"}),
        # points 10 and 40 apart: direction (0.24, 0.97)
        ((10, 40, 10, 40), (0, 0, 0, 0), {"below"}),
        # wide boxes count their width: d = 30, (30 - 0.1 * 200) / 30 = 1/3
        ((0, 0, 100, 10), (30, 0, 130, 10), set()),
    ],
)
def test_where_one_box_is_relative_to_another(
    a: tuple[float, ...], b: tuple[float, ...], expected: set[str]
) -> None:
    assert relations(a, b) == expected


def test_position_is_that_of_the_first_thing_and_of_the_most_confident_objects() -> None:
    prompt = "a photo of a dog left of a cat"
    cat = seen("cat", left=50)
    assert verdict(prompt, seen("dog", left=0), cat) == (True, "")
    assert verdict(prompt, seen("dog", 0.9, left=90), seen("dog", 0.8, left=0), cat) == (
        False,
        "dog is not left of cat: it is right of",
    )
    assert verdict(prompt, seen("dog", left=51), cat)[1].endswith("too close to tell")
    assert verdict(prompt, seen("dog", left=0)) == (False, "no cat")
    assert verdict("a photo of a dog above a cat", seen("dog", left=80), seen("cat", top=80)) == (True, "")


def test_the_shipped_suite_is_what_the_code_makes() -> None:
    assert (SUITES / "geneval-style.toml").read_text(encoding="utf-8") == suite_text()
    suite = load_suite("geneval-style")
    assert Counter(prompt.kind for prompt in suite.prompts) == COUNTS
    assert len(suite.prompts) == 553
    assert "not the published list" in suite.description
    for prompt in suite.prompts:
        assert parse_prompt(prompt.text).kind == prompt.kind


def test_classes_colours_numbers_and_relations_are_dealt_evenly() -> None:
    assert {thing.name for claim in claims("single_object") for thing in claim.things} == set(NAMES)
    counting = Counter(claim.things[0].count for claim in claims("counting"))
    assert max(counting.values()) - min(counting.values()) <= 1
    for kind in ("colors", "color_attr"):
        things = [thing for claim in claims(kind) for thing in claim.things]
        colors = Counter(thing.color for thing in things)
        assert set(colors) == set(COLORS)
        assert max(colors.values()) < 2 * min(colors.values())
        assert "person" not in {thing.name for thing in things}
    assert max(Counter(claim.relation for claim in claims("position")).values()) <= 30
