"""What every evaluator keeps. A new member of EVALUATORS needs a line in WEIGHTS and is tested as it is."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffpref.errors import UserError
from diffpref.evaluators import EVALUATORS, Column, DetailedEvaluator, Evaluator, Runtime
from tests.clips import LONG, picture, write_aesthetic, write_hf_clip, write_open_clip
from tests.geneval_models import write_geneval
from tests.hps_v3_models import write_hps_v3
from tests.image_reward_models import write_image_reward
from tests.vqa_models import write_llava

HPS = ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")
WEIGHTS: dict[str, Callable[[Path], Path] | None] = {
    "oracle": None,  # it has none
    "pickscore": write_hf_clip,
    "clipscore": write_hf_clip,
    "clipscore-jmhessel": write_hf_clip,
    "clipscore-torchmetrics": write_hf_clip,
    "aesthetic": write_aesthetic,
    "image-reward": write_image_reward,
    "geneval": write_geneval,
    "hps-v3": write_hps_v3,
    "vqascore": write_llava,
    **dict.fromkeys(
        [f"hps-{version}{suffix}" for version in ("v2", "v2.1") for suffix in ("", "-aliased")],
        lambda folder: write_open_clip(folder, HPS),
    ),
}
BATCH = 4
SIZES = [(64, 64), (40, 64), (64, 41), (7, 50), (1, 1)]
PROMPTS = {
    "oracle": ["a red circle", "a blue square", "two green triangles", "a red circle left of a blue square"],
    "geneval": ["a photo of a dog", "a photo of a red dog", "a photo of a blue dog", "a photo of two cats"],
}
"""Of evaluators whose prompts have a grammar."""
FREE = ["a red circle", "two dogs & a cat 🐱", "", LONG]

Make = Callable[..., Evaluator]


# open_clip needs torchvision, which other tests must not see: tests/parity/test_hps.py runs this file again,
# in a process of its own, for the evaluators that are left out here.
VISION = importlib.util.find_spec("torchvision") is not None


NAMES = [name for name in EVALUATORS if VISION or not name.startswith("hps-v2")]
SLOW = ("geneval",)  # enlarges every image to 800 pixels; tests/unit/test_geneval.py has the quick half


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NAMES]
)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def make(name: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A maker of evaluators on small random weights; a ``copy`` has the same weights in another folder."""
    write = WEIGHTS[name]
    folders: dict[int, str] = {}
    kept: list[Evaluator] = []  # networks live as long as their evaluators: loaded once for all tests

    def build(copy: int = 0, **changes: Any) -> Evaluator:
        if write and copy not in folders:
            folders[copy] = str(write(tmp_path_factory.mktemp(name) / f"copy{copy}"))
        kept.append(EVALUATORS[name](replace(Runtime(folders.get(copy, ""), batch=BATCH), **changes)))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFPREF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield build


def prompts_of(name: str) -> list[str]:
    return PROMPTS.get(name, FREE)


def inputs(name: str, seed: int, count: int) -> tuple[list[Image.Image], list[str]]:
    prompts = prompts_of(name)
    images = [picture(*SIZES[i % len(SIZES)], seed * 100 + i) for i in range(count)]
    return images, [prompts[i % len(prompts)] for i in range(count)]


def test_says_what_it_is(name: str, make: Make) -> None:
    evaluator = make()
    assert isinstance(evaluator, Evaluator)
    assert evaluator.name == name
    assert evaluator.version
    assert evaluator.scale
    assert len(evaluator.fingerprint) == 64
    assert isinstance(evaluator.higher_is_better, bool)
    assert isinstance(evaluator.needs_prompt, bool)
    columns = evaluator.columns()
    assert next(iter(columns)) == name
    assert all(key == name or key.startswith(f"{name}.") for key in columns)
    assert all(isinstance(column, Column) and column.label and column.meaning for column in columns.values())
    assert columns[name].higher_is_better == evaluator.higher_is_better
    assert not columns[name].per_image


def test_scores_are_finite_float32(name: str, make: Make) -> None:
    evaluator = make()
    images, prompts = inputs(name, 1, 2 * BATCH + 1)
    scores = evaluator.score(images, prompts)
    assert scores.dtype == np.float32
    assert scores.shape == (2 * BATCH + 1,)
    assert np.isfinite(scores).all()
    nothing = evaluator.score([], [])
    assert (nothing.dtype, nothing.shape) == (np.float32, (0,))


def test_details_are_declared_and_belong_to_the_scores(name: str, make: Make) -> None:
    evaluator = make()
    if not isinstance(evaluator, DetailedEvaluator):
        assert list(evaluator.columns()) == [name]
        return
    images, prompts = inputs(name, 2, 5)
    scores, details = evaluator.explain(images, prompts)
    assert np.array_equal(scores, evaluator.score(images, prompts))
    assert [name, *(f"{name}.{detail}" for detail in details)] == list(evaluator.columns())
    assert all(len(values) == 5 for values in details.values())


def test_same_bits_in_any_order_and_company(name: str, make: Make) -> None:
    """Cut anywhere, in any order, repeated or not, in another evaluator on a copy of the weights."""
    first, second = make(), make(copy=1)
    assert first.fingerprint == second.fingerprint

    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 10**6), st.permutations(range(9)), st.lists(st.integers(1, 9), max_size=4))
    def run(seed: int, order: list[int], cuts: list[int]) -> None:
        images, prompts = inputs(name, seed, 9)
        together = first.score(images, prompts)
        ends = [0, *sorted(set(cuts) - {9}), 9]
        apart = np.concatenate(
            [
                second.score([images[i] for i in order[a:b]], [prompts[i] for i in order[a:b]])
                for a, b in itertools.pairwise(ends)
            ]
        )
        assert np.array_equal(apart, together[order])

    run()


def test_another_batch_moves_scores_by_rounding_alone(name: str, make: Make) -> None:
    images, prompts = inputs(name, 3, 9)
    expected = make().score(images, prompts)
    for batch in (1, 3, 16):
        scores = make(batch=batch).score(images, prompts)
        assert np.abs(scores - expected).max() <= 2e-6 * max(1, np.abs(expected).max())


def test_images_are_left_as_they_are(name: str, make: Make) -> None:
    images, prompts = inputs(name, 4, 5)
    before = [image.tobytes() for image in images]
    make().score(images, prompts)
    assert [image.tobytes() for image in images] == before


def test_an_empty_prompt_is_scored_or_refused(name: str, make: Make) -> None:
    image = picture(64, 64)
    if name in PROMPTS:
        with pytest.raises(UserError, match="prompt"):
            make().score([image], [""])
    else:
        assert np.isfinite(make().score([image], [""])).all()


def test_missing_weights_are_the_users_mistake(name: str, make: Make, tmp_path: Path) -> None:
    if WEIGHTS[name] is None:
        return
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "absent.pt", tmp_path / "empty"):
        with pytest.raises(UserError) as error:
            make(weights=str(place))
        assert str(tmp_path) in str(error.value)
        assert error.value.fix


def test_weights_that_are_nowhere_offline(name: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    if WEIGHTS[name] is None:
        return
    for weights in ("", "nobody/nothing"):
        with pytest.raises(UserError) as error:
            make(weights=weights)
        assert "hf download" in str(error.value)


def test_devices_and_precisions_that_cannot_be(name: str, make: Make) -> None:
    if WEIGHTS[name] is None:
        return
    for changes, hint in (
        ({"dtype": "fp16"}, "bf16"),
        ({"device": "cuda:7"}, "cuda:7"),
        ({"device": "gpu"}, "gpu"),
        ({"batch": 0}, "at least 1"),
    ):
        with pytest.raises(UserError) as error:
            make(**changes)
        assert hint in str(error.value)


def test_lower_precision_is_told_in_version_and_fingerprint(name: str, make: Make) -> None:
    if WEIGHTS[name] is None:
        return
    exact, rough = make(), make(dtype="bf16")
    assert "bf16" in rough.version
    assert rough.version != exact.version
    assert rough.fingerprint != exact.fingerprint
    images, prompts = inputs(name, 5, 5)
    scores, expected = rough.score(images, prompts), exact.score(images, prompts)
    assert np.isfinite(scores).all()
    if name != "geneval":  # 0 or 1, which rounding rarely turns
        assert 0 < np.abs(scores - expected).max() < 0.2 * max(1, np.abs(expected).max())


def test_other_weights_give_another_fingerprint(name: str, make: Make, tmp_path: Path) -> None:
    write: Any = WEIGHTS[name]
    if write in (None, *(WEIGHTS[key] for key in WEIGHTS if key.startswith("hps-v2"))):
        return
    other = EVALUATORS[name](Runtime(str(write(tmp_path / "other", seed=5))))
    assert other.fingerprint != make().fingerprint
