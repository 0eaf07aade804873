"""CLIPScore: cosine of a CLIP, under the three names that tables print it by."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from diffpref.errors import UserError
from diffpref.evaluators.agreement import Agreement
from diffpref.evaluators.base import Runtime
from diffpref.evaluators.clip import Clip
from diffpref.evaluators.loading import load_clip
from diffpref.evaluators.texts import BytePairs

VIT_B_32 = "openai/clip-vit-base-patch32"
VIT_L_14 = "openai/clip-vit-large-patch14"

Preset = Literal["cosine", "jmhessel", "torchmetrics"]


def load(runtime: Runtime, preset: Preset) -> Agreement:
    """CLIPScore in one of its definitions, with any CLIP (see `load_clip` for the names of weights).

    Raises:
        UserError: the weights are missing or do not fit; another library's weights where a preset needs those
            of transformers.
    """
    default = VIT_B_32 if preset == "jmhessel" else VIT_L_14
    model = runtime.weights or default
    return of_clip(load_clip(model, runtime), preset, model)


def of_clip(clip: Clip, preset: Preset, model: str) -> Agreement:
    """CLIPScore as this CLIP gives it. model: what it is called.

    Raises:
        UserError: a preset that needs transformers' text rule, which this CLIP has not.
    """
    return {"cosine": _cosine, "jmhessel": _jmhessel, "torchmetrics": _torchmetrics}[preset](clip, model)


def _cosine(clip: Clip, model: str) -> Agreement:
    return Agreement(
        name="clipscore",
        computation="1",
        scale=f"cosine of image and prompt by {model}",
        label="CLIPScore (cosine)",
        meaning="how well the image fits the prompt",
        clip=clip,
        rescale=lambda cosines: cosines,
    )


def _jmhessel(clip: Clip, model: str) -> Agreement:
    """J. Hessel et al., *CLIPScore*, EMNLP 2021, equation (1) with w = 2.5, and their code's prefix."""
    return Agreement(
        name="clipscore-jmhessel",
        computation="1",
        scale=f'2.5 x max(cosine, 0) of image and "A photo depicts " + prompt by {model}',
        label="CLIPScore (Hessel et al.)",
        meaning="how well the image fits the prompt",
        clip=Clip(
            clip.network,
            replace(clip.pixels, fit="crop, round", rgb="last"),
            replace(_byte_pairs(clip, "clipscore-jmhessel"), cleaned=True),
            clip.batch,
        ),
        rescale=lambda cosines: 2.5 * np.maximum(cosines, 0),
        prefix="A photo depicts ",
    )


def _torchmetrics(clip: Clip, model: str) -> Agreement:
    """torchmetrics' CLIPScore clamps the mean over all images, so that of one image is not clamped here."""
    return Agreement(
        name="clipscore-torchmetrics",
        computation="1",
        scale=f"100 x cosine of image and prompt by {model}; the metric is the mean over images, at least 0",
        label="CLIPScore (torchmetrics)",
        meaning="how well the image fits the prompt",
        clip=Clip(
            clip.network,
            clip.pixels,
            replace(_byte_pairs(clip, "clipscore-torchmetrics"), overflow="drop the end token"),
            clip.batch,
        ),
        rescale=lambda cosines: 100 * cosines,
    )


def _byte_pairs(clip: Clip, name: str) -> BytePairs:
    if isinstance(clip.text, BytePairs):
        return clip.text
    raise UserError(
        f"{name} needs a CLIP in transformers' format",
        why="these weights are open_clip's, which prepares text in its own way",
        fix="give a folder or hub id of a CLIPModel, or use the evaluator clipscore",
    )
