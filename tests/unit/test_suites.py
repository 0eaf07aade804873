from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from diffpref.errors import UserError
from diffpref.suites import Prompt, image_seed, load_suite, shipped_suites, spread

SUITE = Path(__file__).parents[1] / "data" / "suite.toml"


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = SUITE.read_text()
    assert old in text
    path = tmp_path / "edited.toml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_a_suite_says_which_images_to_draw() -> None:
    suite = load_suite(SUITE)
    assert (suite.name, suite.scheduler, suite.steps, suite.guidance) == ("hand-written", "ddim", 2, 3.0)
    assert [p.kind for p in suite.prompts[:3]] == ["single_object", "position", "counting"]
    images = suite.images()
    assert len(images) == 14
    assert [(i.id, i.prompt.id, i.sample, i.seed) for i in images[:3]] == [
        ("00000-s0", 0, 0, 0),
        ("00000-s1", 0, 1, 1_000_003),
        ("00001-s0", 1, 0, 1),
    ]
    assert images[2].file == "images/00001-s0.png"
    assert [i.id for i in suite.images(limit=1)] == ["00001-s0", "00001-s1"]  # the kind of two


def test_no_two_images_of_a_suite_share_their_noise() -> None:
    seeds = [image_seed(sample, prompt) for sample in range(4) for prompt in range(5000)]
    assert len(set(seeds)) == len(seeds)


def test_fingerprint_follows_settings_and_prompts_but_not_the_description(tmp_path: Path) -> None:
    original = load_suite(SUITE).fingerprint()
    assert load_suite(edited(tmp_path, "steps = 2", "steps = 3")).fingerprint() != original
    assert load_suite(edited(tmp_path, "two green", "three green")).fingerprint() != original
    assert load_suite(edited(tmp_path, "for tests", "for us")).fingerprint() == original


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("guidance = 3.0", "guidence = 3.0", ["guidence", "'guidance'"]),
        ('scheduler = "ddim"', 'scheduler = "ddmi"', ["scheduler", "'ddim'"]),
        ("steps = 2", "steps = 0", ["steps", "from 1 to 1000"]),
        ("steps = 2", "steps = 2.5", ["steps", "2.5"]),
        ("steps = 2", "", ["steps", "missing"]),
        ("width = 64", "width = 63", ["width", "multiple of 8", "use 64"]),
        ("guidance = 3.0", "guidance = nan", ["guidance", "nan"]),
        ("seeds = [0, 1]", "seeds = [0, 0]", ["seeds", "twice"]),
        ("seeds = [0, 1]", "seeds = []", ["seeds", "at least one"]),
        ("seeds = [0, 1]", "seeds = [-1]", ["seeds", "-1"]),
        ('text = "a red circle"', 'text = " "', ["prompts[0].text", "not empty"]),
        ('text = "a red circle"', 'txt = "a red circle"', ["prompts[0].txt", "'text'"]),
        ('text = "a purple triangle"', 'text = "a red circle"', ["prompts[5].text", "prompts[0]"]),
        ("steps = 2", "steps = ", ["TOML"]),
    ],
)
def test_a_mistake_in_a_suite_is_named_with_its_key(
    tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    path = edited(tmp_path, old, new)
    with pytest.raises(UserError) as raised:
        load_suite(path)
    for word in [str(path), *words]:
        assert word in str(raised.value)


def test_a_suite_that_is_not_there_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"did you mean 'suite.toml'"):
        load_suite(SUITE.with_name("suit.toml"))


def test_a_suite_without_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("steps = 2\nguidance = 1\nwidth = 64\nheight = 64\n")
    with pytest.raises(UserError, match="prompts"):
        load_suite(path)


def test_a_limit_takes_each_kind_by_its_share_and_a_larger_one_keeps_what_is_drawn() -> None:
    """Six of a, three of b, one of c, sorted as suites are. The k-th of n stands at (k - 1/2) / n."""
    kinds = "aaaaaabbbc"
    prompts = [Prompt(number, f"prompt {number}", kind) for number, kind in enumerate(kinds)]
    chosen = {limit: [prompt.id for prompt in spread(prompts, limit)] for limit in range(1, 12)}
    assert chosen[2] == [0, 6]  # 1/12, 1/6
    assert chosen[5] == [0, 1, 2, 6, 7]  # 1/4, 5/12, 1/2
    assert chosen[6] == [0, 1, 2, 6, 7, 9]  # c's one at 1/2
    assert chosen[10] == chosen[11] == list(range(10))
    for limit in range(1, 11):
        assert len(chosen[limit]) == limit
        assert set(chosen[limit]) <= set(chosen[limit + 1])


def test_a_limit_on_one_kind_takes_the_first() -> None:
    prompts = [Prompt(number, f"prompt {number}", "all") for number in range(9)]
    assert [prompt.id for prompt in spread(prompts, 4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", shipped_suites())
def test_a_tenth_of_a_shipped_suite_has_a_tenth_of_every_kind(name: str) -> None:
    suite = load_suite(name)
    whole = Counter(prompt.kind for prompt in suite.prompts)
    part = Counter(prompt.kind for prompt in spread(suite.prompts, len(suite.prompts) // 10))
    for kind, count in whole.items():
        assert abs(part[kind] - count / 10) <= 1
