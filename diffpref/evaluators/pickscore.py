"""PickScore: Y. Kirstain et al., *Pick-a-Pic*, arXiv:2305.01569; the published model card's computation."""

from __future__ import annotations

from diffpref.evaluators.agreement import Agreement
from diffpref.evaluators.base import Runtime
from diffpref.evaluators.clip import Clip
from diffpref.evaluators.loading import load_clip

WEIGHTS = "yuvalkirstain/PickScore_v1"


def load(runtime: Runtime) -> Agreement:
    """``exp(logit_scale) * cosine`` of a CLIP ViT-H/14 tuned on Pick-a-Pic's preferences.

    Weights: folder or hub id of the published CLIPModel.

    Raises:
        UserError: the weights are missing or do not fit.
    """
    return of_clip(load_clip(runtime.weights or WEIGHTS, runtime))


def of_clip(clip: Clip) -> Agreement:
    """PickScore as this CLIP gives it."""
    factor = clip.network.logit_scale
    return Agreement(
        name="pickscore",
        computation="1",
        scale=f"{factor:.6g} (the learned logit scale) x cosine of image and prompt",
        label="PickScore",
        meaning="preference learned from Pick-a-Pic, so in-domain for models trained on Pick-a-Pic: "
        "a gain there may be a gain on this score alone",
        clip=clip,
        rescale=lambda cosines: factor * cosines,
    )
