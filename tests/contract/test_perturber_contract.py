"""What every perturber keeps. New members of PERTURBERS are tested as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffpref.captions import LEVELS, PERTURBERS, Edit, Perturbed
from diffpref.errors import UserError
from tests.chat_server import Act, serving

PROMPTS = (Path(__file__).parents[1] / "data/prompts.txt").read_text(encoding="utf-8").splitlines()
every_perturber = pytest.mark.parametrize("kind", list(PERTURBERS), indirect=True)
needs_no_model = pytest.mark.parametrize("kind", ["rules"], indirect=True)
every_level = pytest.mark.parametrize("level", LEVELS)

FRAGMENTS = [
    *(
        "a",
        "an",
        "the",
        "two",
        "one",
        "red",
        "orange",
        "dog",
        "women",
        "left of",
        "on",
        "at night",
        "4k",
        "tv",
    ),
    *(
        "by",
        "by and",
        "in the style of",
        "van",
        "Gogh",
        "Golden Gate",
        "(",
        ")",
        ":1.2",
        "((",
        "]",
        "<lora:x:0.8>",
    ),
    *(
        "<",
        "--ar 16:9",
        "--no",
        "#tag",
        "@me",
        "https://x.y/z",
        '"',
        "“",
        ",",
        ", ",
        ".",
        "\n",
        "\t",
        "  ",
        "-",
    ),
    *(
        "🐶",
        "👩‍👩‍👧",
        "\u200b",
        "\u200d",
        "\ufe0f",
        "e\u0301",
        "שלום",
        "مرحبا",
        "\u202e",
        "猫",
        "ß",
        "İ",
        "K",
        "\x00",
    ),
]
messy = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(" ".join),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=25).map("".join),
)


class Kind(NamedTuple):
    """A member of PERTURBERS with the settings that it cannot do without."""

    name: str
    settings: dict[str, Any]
    prompts: list[str]
    fuzz: int

    @property
    def type(self) -> type:
        return PERTURBERS[self.name]

    def __call__(self, **settings: Any) -> Any:
        return self.type(**self.settings, **settings)


@pytest.fixture(scope="module")
def kind(request, tmp_path_factory) -> Iterator[Kind]:
    """Models with random weights, and a server that answers at random."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    if name == "rules":
        yield Kind(name, {}, PROMPTS, 1000)
    elif name == "http":
        with serving(lambda question: Act(f"a changed caption, {question.name[:12]}")) as server:
            yield Kind(name, {"url": server.url, "model": "m", "concurrency": 2}, PROMPTS[:12], 40)
    else:
        from tests import caption_models

        save = {"dipper": caption_models.save_t5, "transformers": caption_models.save_llama}[name]
        yield Kind(name, {"model": str(save(folder)), "max_new_tokens": 12}, PROMPTS[:6], 15)


def check(kind: Kind, caption: str, result: Perturbed) -> None:
    """What holds for any caption whatever."""
    assert isinstance(result, Perturbed)
    assert result.changed == (result.text != caption)
    assert not (result.changed and result.failure)
    assert not result.changed or result.text.strip()
    assert all(isinstance(edit, Edit) and edit.before != edit.after for edit in result.edits)
    if kind.name == "rules":
        assert result.changed == bool(result.edits)
        assert len(caption) / 6 - 40 <= len(result.text) <= 6 * len(caption) + 40


@every_perturber
def test_is_a_frozen_dataclass_of_level_and_seed(kind):
    assert kind.type.__dataclass_params__.frozen
    assert {"level", "seed"} <= {field.name for field in dataclasses.fields(kind.type)}


@every_perturber
def test_an_unknown_level_is_the_users_mistake(kind):
    with pytest.raises(UserError, match="medium"):
        kind(level="mediun")


@every_perturber
def test_each_caption_needs_its_row(kind):
    with pytest.raises(ValueError, match="2 captions but 1 rows"):
        kind()(["a", "b"], [0])


@every_perturber
@every_level
def test_empty_and_blank_captions_stay_and_are_reported(kind, level):
    blank = ["", " ", "\n\t ", "\u200b", "\u3000"]
    for caption, result in zip(blank, kind(level=level)(blank, range(len(blank))), strict=True):
        assert result == Perturbed(caption, False, ())
    assert kind(level=level)([], []) == []


@every_perturber
@every_level
def test_batches_equal_single_captions_in_any_order(kind, level):
    perturb, prompts = kind(level=level, seed=3), kind.prompts
    rows = range(len(prompts))
    together = perturb(prompts, rows)
    for prompt, result in zip(prompts, together, strict=True):
        check(kind, prompt, result)
    assert together == kind(level=level, seed=3)(prompts, rows)
    assert together == [perturb([prompt], [row])[0] for prompt, row in zip(prompts, rows, strict=True)]
    assert together[::-1] == perturb(prompts[::-1], rows[::-1])


@every_perturber
def test_seed_and_row_choose_the_words(kind):
    prompts = kind.prompts
    first = kind(level="strong", seed=0)(prompts, range(len(prompts)))
    for other in (
        kind(level="strong", seed=1)(prompts, range(len(prompts))),
        kind(level="strong", seed=0)(prompts, range(1000, 1000 + len(prompts))),
    ):
        assert sum(a.text != b.text for a, b in zip(first, other, strict=True)) > 0.8 * len(prompts)


@every_perturber
def test_provenance_tells_backend_level_and_seed(kind):
    found = kind(level="weak", seed=5).provenance()
    assert (found.backend, found.level, found.seed) == (kind.name, "weak", 5)
    assert found.revision or kind.name == "http"
    assert found.model or kind.name == "rules"
    assert found.template or kind.name == "rules"


@every_perturber
def test_settings_are_what_a_command_line_can_give(kind):
    """The caption command makes its options of the fields."""
    from diffpref.config.loading import specs

    assert all(spec.help or kind.name == "rules" for spec in specs(kind.type).values())


@needs_no_model
def test_levels_grow_in_strength_and_most_captions_change(kind):
    """Words in common with the caption, over a corpus: fewer with every level."""
    kept = []
    for level in LEVELS:
        results = kind(level=level)(PROMPTS, range(len(PROMPTS)))
        for prompt, result in zip(PROMPTS, results, strict=True):
            check(kind, prompt, result)
        assert sum(result.changed for result in results) > 0.85 * len(PROMPTS)
        pairs = [(set(p.split()), set(r.text.split())) for p, r in zip(PROMPTS, results, strict=True)]
        kept.append(sum(len(a & b) / len(a) for a, b in pairs) / len(pairs))
    assert kept[0] > kept[1] + 0.02 > kept[2] + 0.04


def fuzz(kind, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(caption=messy, level=st.sampled_from(LEVELS), row=st.integers(0, 2**40))
    def run(caption, level, row):
        (result,) = kind(level=level)([caption], [row])
        check(kind, caption, result)
        assert kind(level=level)([caption], [row]) == [result]

    run()


@every_perturber
def test_any_text_at_all(kind):
    fuzz(kind, kind.fuzz)


@needs_no_model
@pytest.mark.slow
def test_any_text_at_all_ten_thousand_times(kind):
    fuzz(kind, 10_000)


@every_perturber
@every_level
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "fragment", [*FRAGMENTS, "a red dog ", "a, ", "<a", '"a ', "by and ", "red by x and ", "x"]
)
def test_very_long_captions_take_no_more_than_linear_time(kind, level, fragment):
    caption = fragment * (100_000 // len(fragment))
    check(kind, caption, kind(level=level)([caption], [0])[0])
