"""The exact judge of the small world as an evaluator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffpref.errors import UserError
from diffpref.evaluators.base import Column, Runtime
from diffpref.paths import fingerprint
from diffpref.tiny.oracle import FACTS_WEIGHT, STYLE_PARTS, VERSION, Judgement, judge


class Oracle:
    """Utility of an image: how much of the prompt holds, and how well it meets the world's stated taste."""

    name = "oracle"
    version = VERSION
    higher_is_better = True
    needs_prompt = True
    scale = f"0 to 1: {FACTS_WEIGHT:g} x facts + {1 - FACTS_WEIGHT:g} x style"
    fingerprint = fingerprint({"oracle": VERSION, "facts_weight": FACTS_WEIGHT, "style": list(STYLE_PARTS)})

    def columns(self) -> dict[str, Column]:
        taste = ", ".join(STYLE_PARTS)
        return {
            "oracle": Column(
                "Utility",
                f"what the preference labels were made from: {self.scale.split(': ')[1]}",
                share=True,
            ),
            "oracle.facts": Column(
                "Facts",
                "share of the prompt's facts (number, shapes, colours, position) that hold",
                share=True,
            ),
            "oracle.all_correct": Column(
                "All correct", "share of images in which every fact of the prompt holds", share=True
            ),
            "oracle.style": Column(
                "Style",
                f"how far the image meets the stated taste in what prompts leave unsaid: {taste}",
                share=True,
            ),
            "oracle.verdict": Column("Verdict", "facts that hold, and those that do not", per_image=True),
            "oracle.caption": Column("Shown", "what the image really shows", per_image=True),
        }

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Utilities [N] in 0..1. Raises UserError for a prompt outside the world's grammar."""
        return self.explain(images, prompts)[0]

    def explain(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32] | list[str]]]:
        judgements = [judge(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return np.array([j.utility for j in judgements], np.float32), {
            "facts": np.array([j.facts for j in judgements], np.float32),
            "all_correct": np.array([j.all_correct for j in judgements], np.float32),
            "style": np.array([j.style for j in judgements], np.float32),
            "verdict": [verdict(j) for j in judgements],
            "caption": [j.caption for j in judgements],
        }


def load(runtime: Runtime) -> Oracle:
    """The oracle has no weights; device and dtype change nothing about it. Raises UserError for weights."""
    if runtime.weights:
        raise UserError("the evaluator oracle takes no weights", why="it is a program", fix="leave them out")
    return Oracle()


def verdict(judgement: Judgement) -> str:
    """``"4/4"``, or ``"3/4: not a red circle"``: facts that hold, and the first ones that do not."""
    total = len(judgement.held) + len(judgement.failed)
    counted = f"{len(judgement.held)}/{total}"
    return f"{counted}: not {'; not '.join(judgement.failed)}" if judgement.failed else counted
