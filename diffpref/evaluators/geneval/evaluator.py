"""GenEval's verdict on images, with a Mask2Former and a CLIP from the Hugging Face hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffpref.errors import UserError
from diffpref.evaluators.agreement import with_dtype
from diffpref.evaluators.base import Column, Runtime
from diffpref.evaluators.checkpoints import check_keys, not_loaded
from diffpref.evaluators.clip import Clip, placed
from diffpref.evaluators.geneval import colours, detector, rules
from diffpref.evaluators.geneval.grammar import parse_prompt
from diffpref.evaluators.loading import load_clip
from diffpref.evaluators.pixels import content
from diffpref.paths import fingerprint, resolve_or_hub_id

VERSION = "geneval-like 1"
_NO_MASK = np.zeros((0, 0), np.bool_)  # masks are as large as the images: only crops are kept of them
CLIP = "openai/clip-vit-large-patch14"


class GenEval:
    """1 for an image that shows what its prompt claims, else 0.

    GenEval-like: rules, thresholds and CLIP are the published ones, the detector is a checkpoint of another
    training of the same architecture, so numbers are near those of the original but not equal to them.
    """

    name = "geneval"
    higher_is_better = True
    needs_prompt = True
    scale = "0 or 1: everything that the prompt names is there"

    def __init__(self, finder: detector.Detector, namer: colours.ColourNamer, runtime: Runtime) -> None:
        self.finder, self.namer = finder, namer
        self.version = with_dtype(VERSION, runtime.dtype)
        self.fingerprint = fingerprint(
            {
                "evaluator": self.name,
                "version": self.version,
                "detector": finder.weights,
                "clip": namer.clip.describe(),
                "rules": [
                    rules.THRESHOLD,
                    rules.COUNTING_THRESHOLD,
                    rules.MAX_OBJECTS,
                    rules.POSITION_OFFSET,
                ],
                "input": [detector.SHORT_EDGE, detector.LONG_EDGE],
                "colours": [colours.BACKGROUND, *colours.TEMPLATES],
            }
        )

    def columns(self) -> dict[str, Column]:
        return {
            "geneval": Column(
                "GenEval-like",
                "share of images that show the objects, number, colours and position of their prompt "
                "(GenEval's rules, another detector checkpoint), mean of the means of the tasks",
                share=True,
                over_kinds=True,
            ),
            "geneval.reason": Column("Reason", "what does not hold", per_image=True),
            "geneval.found": Column("Found", "objects that the detector found", per_image=True),
        }

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float32]:
        """1 or 0 for each image [N]. Raises UserError for a prompt that is none of GenEval's tasks."""
        return self.explain(images, prompts)[0]

    def explain(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32] | list[str]]]:
        claims = [parse_prompt(prompt) for prompt in prompts]
        places: dict[Hashable, list[int]] = {}
        for index, (image, _) in enumerate(zip(images, claims, strict=True)):
            places.setdefault(content(image), []).append(index)
        founds: list[rules.Found] = [{} for _ in claims]
        crops: list[tuple[int, str, Image.Image]] = []
        for equal in places.values():
            image = images[equal[0]]
            detections = self.finder.detect(image)
            for index in equal:
                found = rules.kept(detections, claims[index])
                crops += [
                    (index, d.name, colours.crop_object(image, d))
                    for d in rules.to_colour(claims[index], found)
                ]
                founds[index] = {
                    name: [replace(d, mask=_NO_MASK) for d in each] for name, each in found.items()
                }
        named = self.namer.name([crop for *_, crop in crops], [name for _, name, _ in crops])
        colors: list[dict[str, str]] = [{} for _ in claims]
        for (index, name, _), color in zip(crops, named, strict=True):
            colors[index][name] = color
        verdicts = [rules.judge(*each) for each in zip(claims, founds, colors, strict=True)]
        return np.array([v.correct for v in verdicts], np.float32), {
            "reason": ["; ".join(v.reasons) for v in verdicts],
            "found": [_listing(found, color) for found, color in zip(founds, colors, strict=True)],
        }


def _listing(found: rules.Found, colors: dict[str, str]) -> str:
    """ "2 dog, 1 car (red)": number by class, and the colour of the most confident one where it was asked."""
    counts = Counter({name: len(objects) for name, objects in found.items()})
    listed = [
        f"{n} {name}" + (f" ({colors[name]})" if name in colors else "") for name, n in counts.most_common()
    ]
    return ", ".join(listed) or "nothing"


def load(runtime: Runtime) -> GenEval:
    """The evaluator with the published detector and CLIP, or those that ``runtime.weights`` names.

    weights: "DETECTOR" or "DETECTOR,CLIP", each a folder or a hub id in transformers' format; CLIP may be
    whatever ``load_clip`` takes. ``runtime.batch`` and ``runtime.dtype`` are of CLIP, which sees crops; the
    detector takes images one by one, in fp32.

    Raises:
        UserError: weights are missing or of another architecture.
    """
    first, _, second = runtime.weights.partition(",")
    finder = detector.Detector(_mask2former(first.strip() or detector.PUBLISHED), placed(runtime))
    return of_networks(finder, load_clip(second.strip() or CLIP, runtime), runtime)


def of_networks(finder: detector.Detector, clip: Clip, runtime: Runtime) -> GenEval:
    """The evaluator as this detector and this CLIP give it."""
    clip = replace(clip, pixels=replace(clip.pixels, fit="crop, round"))  # as open_clip crops
    return GenEval(finder, colours.ColourNamer(clip), runtime)


def _mask2former(spec: str) -> Any:
    """The detector in float32."""
    from transformers import AutoConfig, Mask2FormerForUniversalSegmentation

    place = resolve_or_hub_id(spec, "detector of geneval")
    try:
        config = AutoConfig.from_pretrained(place)
        network: Any = Mask2FormerForUniversalSegmentation  # typed as giving a model alone
        if config.model_type == "mask2former":
            model, report = network.from_pretrained(
                place,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # safetensors, the hub and the file system each have types of their own
        raise not_loaded("the detector of geneval from", spec, error) from error
    if config.model_type != "mask2former":
        raise UserError(
            f"{place} is no detector for geneval", why=f"its config.json says {config.model_type!r}"
        )
    check_keys(
        str(place),
        "the weights of the Mask2Former that its config.json describes",
        missing=list(report["missing_keys"]),
        unexpected=[],  # checkpoints converted by older versions hold buffers too
        shapes=[
            f"{name}: {list(has)}, expected {list(wants)}" for name, has, wants in report["mismatched_keys"]
        ],
    )
    return model
