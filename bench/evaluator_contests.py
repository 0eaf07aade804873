"""What takes part in evaluators.py: each evaluator, the loop it is compared with, and what both are given."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from evaluator_models import (
    SIZES,
    THINGS,
    Size,
    make_aesthetic,
    make_clip,
    make_detector,
    make_hps,
    make_image_reward,
)
from PIL import Image

from diffpref.evaluators import (
    EVALUATORS,
    DetailedEvaluator,
    Evaluator,
    Runtime,
    aesthetic,
    clip_score,
    hps,
    pickscore,
)
from diffpref.evaluators.agreement import Agreement
from diffpref.evaluators.clip import DTYPES, Clip, placed
from diffpref.evaluators.geneval.detector import Detector
from diffpref.evaluators.geneval.evaluator import of_networks
from diffpref.evaluators.geneval.words import COLORS, RELATIONS, plural, with_article
from diffpref.evaluators.hf_clip import hf_network
from diffpref.evaluators.image_reward import ImageReward
from diffpref.evaluators.open_clip_models import open_clip_network
from diffpref.evaluators.pixels import Pixels
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
    """How both sides run, and the CLIP that most of them share."""

    values: argparse.Namespace

    @property
    def size(self) -> Size:
        return SIZES[self.values.size]

    @property
    def runtime(self) -> Runtime:
        return Runtime("", self.values.device, self.values.dtype, self.values.batch)

    @property
    def hardware(self) -> tuple[str, torch.dtype]:
        return self.values.device, DTYPES[self.values.dtype]

    @property
    def device(self) -> torch.device:
        return placed(self.runtime)

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """The CLIP's model and tokenizer, as the loops take them."""
        return make_clip(self.size, self.values.device)

    @cached_property
    def clip(self) -> Clip:
        """The same CLIP, as the evaluators take it."""
        network = hf_network(
            *self.parts, Pixels(224, "crop, floor"), self.device, self.values.dtype, "random CLIP"
        )
        return Clip(network, network.pixels, network.text, self.values.batch)


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


def on_clip(evaluator: Callable[[Clip], Agreement], loop: type[HFClip]) -> Callable[[Setting], Contest]:
    def build(setting: Setting) -> Contest:
        clip = setting.clip  # moves and casts the model that the loop gets
        return Contest(evaluator(clip), loop(*setting.parts, *setting.hardware), clip)  # type: ignore[arg-type]

    return build


def clipscore(preset: clip_score.Preset, loop: type[HFClip]) -> Callable[[Setting], Contest]:
    return on_clip(lambda clip: clip_score.of_clip(clip, preset, "random weights"), loop)


def hps_v2(setting: Setting) -> Contest:
    model, tokenizer = make_hps(setting.size, setting.values.device)
    network = open_clip_network(model, tokenizer, setting.device, setting.runtime, "random open_clip")
    evaluator = hps.of_network(network, "v2", True, setting.values.batch)
    return Contest(evaluator, HPSLoop(model, *setting.hardware), evaluator.clip)


def aesthetic_v2(setting: Setting) -> Contest:
    head = make_aesthetic(setting.size)
    evaluator = aesthetic.of_clip(setting.clip, head)
    return Contest(evaluator, AestheticLoop(head, *setting.parts, *setting.hardware), evaluator.clip)


def image_reward(setting: Setting) -> Contest:
    network, tokenizer = make_image_reward(setting.size, setting.values.device)
    evaluator = ImageReward(network, tokenizer, setting.runtime, "random ImageReward")
    loop = ImageRewardLoop(network, tokenizer, *setting.hardware)
    return Contest(evaluator, loop, forget=evaluator._known.clear)


def geneval(setting: Setting) -> Contest:
    model = make_detector(setting.size, setting.values.device)
    finder = Detector(model, setting.device, "random Mask2Former")
    evaluator = of_networks(finder, setting.clip, setting.runtime)
    loop = GenEvalLoop(model, HFClip(*setting.parts, *setting.hardware))
    namer = evaluator.namer
    return Contest(evaluator, loop, namer.clip, namer._classifiers.clear, geneval_prompt)


def oracle(setting: Setting) -> Contest:
    return Contest(
        EVALUATORS["oracle"](setting.runtime),
        None,
        prompt=lambda number: example(0, number).captions[0],
        image=lambda seed, _: example(0, seed).image,
    )


CONTESTS: dict[str, Callable[[Setting], Contest]] = {
    "pickscore": on_clip(pickscore.of_clip, PickScoreLoop),
    "hps-v2": hps_v2,
    "clipscore": clipscore("cosine", CosineLoop),
    "clipscore-jmhessel": clipscore("jmhessel", HesselLoop),
    "clipscore-torchmetrics": clipscore("torchmetrics", TorchmetricsLoop),
    "aesthetic": aesthetic_v2,
    "image-reward": image_reward,
    "geneval": geneval,
    "oracle": oracle,
}
