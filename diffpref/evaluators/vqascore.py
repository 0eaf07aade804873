"""VQAScore: the probability that a model, asked whether an image shows its prompt, answers "Yes".

Source: Z. Lin et al., *Evaluating Text-to-Visual Generation with Image-to-Text Generation* (ECCV 2024,
arXiv:2404.01291): P("Yes" | image, question). The paper's own model, CLIP-FlanT5, is no class of
transformers, so the score is of another model, which its label names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffpref.errors import UserError
from diffpref.evaluators.agreement import with_dtype
from diffpref.evaluators.base import Column, Runtime
from diffpref.evaluators.checkpoints import one_line, weights_hash
from diffpref.evaluators.clip import placed
from diffpref.evaluators.unpadded import unpadded_outputs
from diffpref.language_models import loading
from diffpref.language_models.image_text import ImageTextModel, find_image_text_model
from diffpref.paths import fingerprint
from diffpref.transfer import to_device

WEIGHTS = "llava-hf/llava-1.5-7b-hf"
VERSION = "1"
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
"""Of the paper (section 3)."""
_LOWER_CASE = ("instructblip",)
"""Model types that answer in lower case: the authors take "yes" for them."""

Floats = NDArray[np.float32]


class VqaScore:
    """Probability of the token "Yes" as the first of the answer, among all tokens of the vocabulary."""

    name = "vqascore"
    higher_is_better = True
    needs_prompt = True
    scale = 'probability of the answer "Yes", 0 to 1'

    def __init__(self, model: ImageTextModel, label: str, runtime: Runtime) -> None:
        self.model, self.label = model, label
        device = placed(runtime)
        # one by one on the CPU, where more are no faster and a score so has the same bits in any company
        self.rows = 1 if device.type == "cpu" else runtime.batch
        self.version = with_dtype(VERSION, runtime.dtype)
        self.network = model.network(str(device), runtime.dtype)
        loading.end_tokens(self.network, model.tokenizer)  # gives those a padding token that have none
        words = ("yes", "no") if model.kind in _LOWER_CASE else ("Yes", "No")
        self.answers = [_token(word, model.tokenizer, label) for word in words]
        self.fingerprint = fingerprint(
            {
                "evaluator": self.name,
                "version": self.version,
                "weights": weights_hash(self.network),
                "question": model.asked(QUESTION),
                "answers": self.answers,
                "vocabulary": model.tokenizer.get_vocab(),
                "pixels": model.processor.image_processor.to_json_string(),
            }
        )

    def columns(self) -> dict[str, Column]:
        return {
            self.name: Column(
                f"VQAScore ({self.label})",
                f"probability that {self.label} answers Yes when asked whether the image shows the prompt; "
                "published VQAScores are mostly of CLIP-FlanT5, another model, and do not compare",
            ),
            f"{self.name}.no": Column(
                f"P(No) ({self.label})",
                "probability of the answer No: with VQAScore it makes about 1, or the model does not answer "
                "such questions",
                higher_is_better=False,
            ),
        }

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Floats:
        """Probabilities [N] of RGB images and their prompts; an empty prompt is asked about as it is."""
        return self.explain(images, prompts)[0]

    def explain(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> tuple[Floats, dict[str, Floats | list[str]]]:
        found = unpadded_outputs(images, prompts, self._prepare, self._probabilities, self.rows)
        return found[:, 0], {"no": found[:, 1]}

    def _prepare(self, image: Image.Image, prompt: str) -> tuple[tuple[int, ...], tuple[Image.Image, str]]:
        asked = self._asked(prompt)
        return (*image.size, self._length(asked)), (image, asked)

    def _asked(self, prompt: str) -> str:
        plain = loading.without_special_tokens(prompt, self.model.tokenizer)
        return self.model.asked(QUESTION.replace("{}", plain))

    def _length(self, asked: str) -> int:
        """Tokens of a question. Raises UserError beyond the model's table of positions."""
        size = len(self.model.tokenizer(asked, verbose=False)["input_ids"])
        limit = loading.positions(self.model.source.config)
        if limit and size > limit:
            raise UserError(
                f"a prompt is too long for {self.label}",
                why=f"with the question it has {size} tokens, the model reads {limit}: {asked[:80]!r} ...",
                fix="shorten it, leave it out, or take a model that reads more, such as LLaVA or Qwen-VL",
            )
        return size

    def _probabilities(self, pairs: list[tuple[Image.Image, str]]) -> torch.Tensor:
        """Of Yes and No [B, 2], for pairs of one shape."""
        images, asked = [image for image, _ in pairs], [text for _, text in pairs]
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        try:
            with torch.inference_mode(), exact:
                logits = self._logits(self.model.inputs(images, asked, self.network))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.label} has no memory for {len(images)} images at a time",
                why=one_line(error),
                fix="lower --batch, or take a smaller model or bf16",
            ) from error
        except Exception as error:  # an image too thin for the model, say: each processor has its own types
            sizes = ", ".join(sorted({f"{image.width}x{image.height}" for image in images}))
            raise UserError(
                f"{self.label} fails on an image of {sizes} pixels",
                why=f"{type(error).__name__}: {one_line(error)}",
                fix="take another model, or leave such images and prompts out",
            ) from error
        return logits.softmax(dim=-1)[:, self.answers]

    def _logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Of the first token of the answer, float32 [B, vocabulary], before whatever generation would do."""
        placed_inputs = {
            name: to_device(
                value, self.network.device, self.network.dtype if value.is_floating_point() else None
            )
            for name, value in inputs.items()
        }
        forced = getattr(self.network.generation_config, "forced_bos_token_id", None) is not None
        output = self.network.generate(
            **placed_inputs,
            max_new_tokens=2 if forced else 1,  # BART's kind begins every answer with one and the same token
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return output.logits[-1].float()


def _token(word: str, tokenizer: Any, label: str) -> int:
    """The one token of a word that begins a text, with the space that some tokenizers put before it."""
    tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(tokens)
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        raise UserError(
            f"{label} cannot be asked for VQAScore",
            why=f"{word!r} is no single token of its vocabulary, but {pieces}",
            fix="take another model, such as LLaVA or Qwen-VL",
        )
    return int(tokens[0])


def load(runtime: Runtime) -> VqaScore:
    """VQAScore by a model of transformers that reads images and texts and writes texts.

    Weights: folder or hub id; "" for LLaVA-1.5 7B. 7 billion weights are 28 GB in fp32, 14 in bf16.

    Raises:
        UserError: there is no such model; it is of another kind; "Yes" is not one token of it.
    """
    placed(runtime)  # before anything is fetched
    weights = runtime.weights or WEIGHTS
    return VqaScore(find_image_text_model(weights), Path(weights).name, runtime)
