"""The small world: what is drawn is what the oracle reads, and facts are counted as a person would."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffpref.errors import UserError
from diffpref.tiny.bank import example
from diffpref.tiny.grammar import describe, is_held_out, kind_caption, parse_prompt
from diffpref.tiny.oracle import FACTS_WEIGHT, STYLE_PARTS, check_facts, judge, parse_image, reads_all
from diffpref.tiny.render import render
from diffpref.tiny.scenes import KINDS, SIZE, Scene, Style, Thing, relation, sample_scene
from diffpref.tiny.suites import FULL, suite_prompts

PLAIN = Style(tone="light", lightness=0.92, texture="plain", outline=False, saturation=0.9, size="large")
RED_CIRCLE = Thing("circle", "red", 16, 32, 10)
BLUE_SQUARE = Thing("square", "blue", 46, 32, 10)
GREEN_DIAMOND = Thing("diamond", "green", 46, 12, 8)


def scene(*things: Thing, **style: object) -> Scene:
    return Scene("color_attr", things, dataclasses.replace(PLAIN, **style))


def test_oracle_reads_clean_renders() -> None:
    rng = np.random.default_rng(5)
    count, wrong = 1500, 0
    for _ in range(count):
        drawn = sample_scene(rng)
        caption = kind_caption(drawn, rng)
        image = render(drawn)
        wrong += not (reads_all(image, drawn.things) and judge(image, caption).all_correct)
    assert wrong <= 0.005 * count


def test_full_caption_of_a_render_holds_of_it() -> None:
    for index in range(200):
        one = example(3, index)
        assert judge(one.image, describe(one.scene.things)).all_correct


@pytest.mark.parametrize(
    ("prompt", "held", "facts"),
    [
        ("a red circle", 2, 3),  # two things in all, not one
        ("a red circle left of a blue square", 6, 6),
        ("a red circle right of a blue square", 5, 6),
        ("a photo of a circle and a square", 3, 3),
        ("a blue circle and a red square", 3, 5),  # both shapes, the number, neither colour
        ("two circles", 1, 2),  # the number in all holds; two circles do not
        ("a drawing of three yellow diamonds", 0, 3),
        ("a circle above a square", 3, 4),
    ],
)
def test_facts_counted_by_hand(prompt: str, held: int, facts: int) -> None:
    verdict = judge(render(scene(RED_CIRCLE, BLUE_SQUARE)), prompt)
    assert (len(verdict.held), len(verdict.held) + len(verdict.failed)) == (held, facts)
    assert verdict.facts == pytest.approx(held / facts)
    assert verdict.all_correct == (held == facts)
    assert verdict.utility == pytest.approx(FACTS_WEIGHT * verdict.facts + (1 - FACTS_WEIGHT) * verdict.style)
    assert verdict.caption == "a red circle left of a blue square"


def test_two_of_a_shape_share_a_count() -> None:
    twins = (RED_CIRCLE, Thing("circle", "blue", 46, 32, 10))
    claim = parse_prompt("a red circle and a blue circle")
    assert all(check_facts(twins, claim).values())
    assert not all(check_facts((RED_CIRCLE, RED_CIRCLE), claim).values())
    assert check_facts((RED_CIRCLE,), claim) == {
        "2 things in all": False,
        "two circles": False,
        "a red circle": True,
        "a blue circle": False,
    }


@pytest.mark.parametrize(
    ("things", "caption"),
    [
        ((), "nothing"),
        ((GREEN_DIAMOND,), "a green diamond"),
        ((RED_CIRCLE, GREEN_DIAMOND), "a red circle left of a green diamond"),
        ((GREEN_DIAMOND, BLUE_SQUARE), "a green diamond above a blue square"),
        ((RED_CIRCLE, Thing("circle", "red", 46, 32, 10)), "two red circles"),
        ((RED_CIRCLE, GREEN_DIAMOND, BLUE_SQUARE), "a red circle, a green diamond and a blue square"),
    ],
)
def test_captions_say_what_is_shown(things: tuple[Thing, ...], caption: str) -> None:
    assert parse_image(render(scene(*things))).caption == caption


def test_relation_follows_the_larger_difference() -> None:
    assert relation(Thing("circle", "red", 10, 10, 5), Thing("circle", "red", 40, 30, 5)) == "left of"
    assert relation(Thing("circle", "red", 10, 40, 5), Thing("circle", "red", 20, 10, 5)) == "below"


@pytest.mark.parametrize(
    ("better", "worse", "part"),
    [
        ({"lightness": 0.95}, {"lightness": 0.6, "tone": "mid"}, "light"),
        ({"texture": "plain"}, {"texture": "stripes"}, "plain"),
        ({"texture": "plain"}, {"texture": "checks"}, "plain"),
        ({"outline": True}, {"outline": False}, "outlined"),
        (
            {"outline": True, "tone": "dark", "lightness": 0.15},
            {"tone": "dark", "lightness": 0.15},
            "outlined",
        ),
        ({"saturation": 0.9}, {"saturation": 0.5}, "vivid"),
    ],
)
def test_style_parts_measure_their_own_factor(
    better: dict[str, object], worse: dict[str, object], part: str
) -> None:
    high = parse_image(render(scene(RED_CIRCLE, BLUE_SQUARE, **better))).style
    low = parse_image(render(scene(RED_CIRCLE, BLUE_SQUARE, **worse))).style
    assert high[part] > low[part] + 0.3
    assert set(high) == set(STYLE_PARTS)
    for other in set(STYLE_PARTS) - {part}:
        assert high[other] == pytest.approx(low[other], abs=0.25)


def test_large_things_please_more() -> None:
    small = render(scene(dataclasses.replace(RED_CIRCLE, radius=7)))
    large = render(scene(dataclasses.replace(RED_CIRCLE, radius=11)))
    assert parse_image(large).style["large"] > parse_image(small).style["large"] + 0.2


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["RGB", "RGBA", "L", "P", "CMYK", "I;16", "1"]),
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    seed=st.integers(0, 1000),
    noise=st.booleans(),
)
def test_oracle_survives_any_image(mode: str, width: int, height: int, seed: int, noise: bool) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3)) if noise else np.full((height, width, 3), seed % 256)
    image = Image.fromarray(pixels.astype(np.uint8))
    image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
    verdict = judge(image, "a red circle left of a blue square")
    assert 0 <= verdict.utility <= 1
    assert 0 <= verdict.style <= 1


def test_larger_renders_are_read_too() -> None:
    image = render(scene(RED_CIRCLE, BLUE_SQUARE)).resize((512, 512), Image.Resampling.NEAREST)
    assert judge(image, "a red circle left of a blue square").all_correct


@pytest.mark.parametrize(
    "prompt", ["", "a castle", "a red", "two circle", "a orange circle", "a circle near a square"]
)
def test_prompts_outside_the_grammar_are_named(prompt: str) -> None:
    with pytest.raises(UserError, match="oracle cannot read"):
        judge(Image.new("RGB", (SIZE, SIZE)), prompt)


def test_every_caption_parses_to_its_own_kind() -> None:
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for _ in range(50):
            drawn = sample_scene(rng, kind)
            claim = parse_prompt(kind_caption(drawn, rng))
            assert (claim.kind, claim.total) == (kind, len(drawn.things))


def test_suites_and_training_captions_are_disjoint() -> None:
    suite = {prompt for kind in FULL for prompt in suite_prompts(kind)}
    trained = {caption for index in range(1500) for caption in example(23, index).captions}
    assert all(is_held_out(prompt) for prompt in suite)
    assert not suite & trained
