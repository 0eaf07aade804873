"""What takes part in evaluators.py: each evaluator, the loop it is compared with, and what both are given."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluator_loops import (
    AestheticLoop,
    CosineLoop,
    GenEvalLoop,
    HesselLoop,
    HFClip,
    HPSLoop,
    ImageRewardLoop,
    Pair,
    PickScoreLoop,
    TorchmetricsLoop,
    singles,
)
from evaluator_models import SIZES, THINGS, write_aesthetic, write_detector, write_hps, write_image_reward
from PIL import Image

from diffpref.evaluators import EVALUATORS, DetailedEvaluator, Evaluator, Runtime
from diffpref.evaluators.clip import DTYPES, Clip
from diffpref.evaluators.geneval.words import COLORS, RELATIONS, plural, with_article
from diffpref.tiny.bank import example

SAME = {"hps-v2.1": "hps-v2", "hps-v2-aliased": "hps-v2", "hps-v2.1-aliased": "hps-v2"}
"""Evaluators with the network and the loop of another one, which stands for them."""
TOO_LARGE = ("hps-v3", "vqascore")
"""Evaluators of 7 billion weights, which take no part: an image and its prompt take a core minutes."""
WORDS = (
    "red fox",
    "old harbour",
    "lanterns",
    "heavy snow",
    "a blue heron",
    "painted in oil",
    "at dawn",
    "4k",
)


@dataclass(frozen=True)
class Setting:
    """Where the weights lie, and how both sides run. clip: folder of the CLIP that most of them share."""

    root: Path
    values: argparse.Namespace

    @property
    def clip(self) -> Path:
        return self.root / "clip"

    @property
    def hardware(self) -> tuple[str, torch.dtype]:
        return self.values.device, DTYPES[self.values.dtype]

    def load(self, name: str, weights: object) -> Any:
        runtime = Runtime(str(weights), self.values.device, self.values.dtype, self.values.batch)
        return EVALUATORS[name](runtime)


@dataclass(frozen=True)
class Contest:
    """An evaluator, the loop it is compared with, and what both are given.

    clip: the evaluator's, whose embeddings are forgotten before a turn; forget: whatever else it keeps.
    """

    evaluator: Evaluator
    loop: Callable[[Sequence[Pair]], np.ndarray] | None
    clip: Clip | None = None
    forget: Callable[[], None] = lambda: None
    prompt: Callable[[int], str] = lambda number: caption(number)
    image: Callable[[int, int], Image.Image] = lambda seed, side: picture(seed, side)

    def ours(self, pairs: Sequence[Pair], batch: int) -> tuple[np.ndarray, list[Any]]:
        """Scores [2 x pairs] and details, from calls with `batch` images, as `diffpref score` has them."""
        images, prompts = zip(*singles(pairs), strict=True)
        if self.clip is not None:
            self.clip.network.known.clear()
        self.forget()
        calls = [slice(start, start + batch) for start in range(0, len(images), batch)]
        if isinstance(self.evaluator, DetailedEvaluator):
            parts = [self.evaluator.explain(images[call], prompts[call]) for call in calls]
            return np.concatenate([scores for scores, _ in parts]), [details for _, details in parts]
        return np.concatenate([self.evaluator.score(images[call], prompts[call]) for call in calls]), []


def picture(seed: int, side: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def caption(number: int) -> str:
    chosen = np.random.default_rng(number).choice(WORDS, size=3 + number % 6)
    return f"{number} {' '.join(chosen)}"


def geneval_prompt(number: int) -> str:
    """Of one of GenEval's tasks in turn, about things that the random detector sees."""
    random = np.random.default_rng(number)
    first, second = random.choice(THINGS, 2, replace=False)
    red, blue = random.choice(COLORS, 2)
    tasks = (
        f"{with_article(red)} {first} and {with_article(blue)} {second}",
        with_article(first),
        f"{with_article(first)} {random.choice(RELATIONS)} {with_article(second)}",
        f"{with_article(red)} {first}",
        f"{with_article(first)} and {with_article(second)}",
        f"two {plural(str(first))}",
    )
    return f"a photo of {tasks[number % len(tasks)]}"


def distinct(contest: Contest, values: argparse.Namespace) -> list[Pair]:
    image, side = contest.image, values.side
    return [(image(2 * i, side), image(2 * i + 1, side), contest.prompt(i)) for i in range(values.pairs)]


def repeated(contest: Contest, values: argparse.Namespace) -> list[Pair]:
    return list(itertools.islice(_groups(contest, values.group, values.side), values.pairs))


def _groups(contest: Contest, size: int, side: int) -> Iterator[Pair]:
    for group in itertools.count():
        images = [contest.image(size * group + i, side) for i in range(size)]
        for first, second in itertools.combinations(images, 2):
            yield first, second, contest.prompt(group)


def on_clip(name: str, loop: type[HFClip]) -> Callable[[Setting], Contest]:
    def build(setting: Setting) -> Contest:
        evaluator = setting.load(name, setting.clip)
        return Contest(evaluator, loop(setting.clip, *setting.hardware), evaluator.clip)  # type: ignore[arg-type]

    return build


def hps(setting: Setting) -> Contest:
    evaluator = setting.load("hps-v2", write_hps(setting.root / "hps", SIZES[setting.values.size]))
    network = evaluator.clip.network.encode_images.__self__
    return Contest(evaluator, HPSLoop(network, *setting.hardware), evaluator.clip)


def aesthetic(setting: Setting) -> Contest:
    evaluator = setting.load("aesthetic", write_aesthetic(setting.root, SIZES[setting.values.size]))
    return Contest(evaluator, AestheticLoop(setting.clip, evaluator.head, *setting.hardware), evaluator.clip)


def image_reward(setting: Setting) -> Contest:
    folder = write_image_reward(setting.root / "image-reward", SIZES[setting.values.size])
    evaluator = setting.load("image-reward", folder)
    loop = ImageRewardLoop(evaluator.network, evaluator.tokenizer, *setting.hardware)
    return Contest(evaluator, loop, forget=evaluator._known.clear)


def geneval(setting: Setting) -> Contest:
    folder = write_detector(setting.root / "detector", SIZES[setting.values.size])
    evaluator = setting.load("geneval", f"{folder},{setting.clip}")
    loop = GenEvalLoop(folder, HFClip(setting.clip, *setting.hardware))
    namer = evaluator.namer
    return Contest(evaluator, loop, namer.clip, namer._classifiers.clear, geneval_prompt)


def oracle(setting: Setting) -> Contest:
    return Contest(
        setting.load("oracle", ""),
        None,
        prompt=lambda number: example(0, number).captions[0],
        image=lambda seed, _: example(0, seed).image,
    )


CONTESTS: dict[str, Callable[[Setting], Contest]] = {
    "pickscore": on_clip("pickscore", PickScoreLoop),
    "hps-v2": hps,
    "clipscore": on_clip("clipscore", CosineLoop),
    "clipscore-jmhessel": on_clip("clipscore-jmhessel", HesselLoop),
    "clipscore-torchmetrics": on_clip("clipscore-torchmetrics", TorchmetricsLoop),
    "aesthetic": aesthetic,
    "image-reward": image_reward,
    "geneval": geneval,
    "oracle": oracle,
}
