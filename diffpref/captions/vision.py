"""Captions by any image-text-to-text model of transformers: LLaVA, Qwen-VL, BLIP, Florence-2 and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from diffpref.captions import answers, options
from diffpref.captions.base import Captioned, Provenance
from diffpref.captions.templates import Template, read_template, shipped_template
from diffpref.config.schema import option
from diffpref.errors import UserError
from diffpref.language_models import loading
from diffpref.language_models.image_text import ImageTextModel, find_image_text_model

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffpref.captions.sampling import Answer

_OWN_TEMPLATES = ("florence2",)


@dataclass(frozen=True, kw_only=True)
class TransformersCaptioner:
    """A vision-language model in this process.

    With greedy decoding a caption depends on image, prompt and settings alone, otherwise on the row as well;
    on batch-mates never, but for the last digits of the arithmetic, which may turn a near tie between tokens.
    """

    model: str = option(
        help="folder or hub id of an image-text-to-text model, such as llava-hf/llava-1.5-7b-hf"
    )
    revision: str = options.revision_option()
    template: str = option("", help="file with the instruction ({prompt}, {tokens}); empty: one that fits")
    max_tokens: int = options.max_tokens_option()
    max_new_tokens: int = options.new_tokens_option(128)
    temperature: float = options.temperature_option(0.0)
    top_p: float = options.top_p_option(1.0)
    batch_size: int = options.batch_size_option()
    device: str = options.device_option()
    dtype: str = options.dtype_option()
    seed: int = options.seed_option()

    def __post_init__(self) -> None:
        options.require_valid(self, "captioner")
        options.require_sampling(self.temperature, self.top_p, "captioner")
        if self.template:
            _ = self._template

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], rows: Sequence[int]
    ) -> list[Captioned]:
        """A caption of each image. Raises UserError where the model cannot be had or captions nothing."""
        if not len(images) == len(prompts) == len(rows):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts and {len(rows)} rows")
        texts = [self._text(prompt) for prompt in prompts]
        sizes = [len(self._model.tokenizer(text)["input_ids"]) for text in texts]
        results = [
            Captioned("", options.too_long(prompt) or self._too_long(size))
            for prompt, size in zip(prompts, sizes, strict=True)
        ]
        order = sorted((i for i in range(len(images)) if not results[i].failure), key=lambda i: sizes[i])
        problems = 0
        for chunk in loading.chunks(order, sizes, self.batch_size, self._model.unpadded):
            found, broken = self._chunk([(images[i], texts[i], rows[i]) for i in chunk])
            problems += broken
            for i, result in zip(chunk, found, strict=True):
                results[i] = result
        if problems == len(images) > 1:
            raise UserError(
                f"{self.model} cannot caption these images", why=results[0].failure, fix="take another model"
            )
        return results

    def provenance(self) -> Provenance:
        """The commit of the hub, or a hash of the folder; loads no weights."""
        return Provenance(
            "transformers", self.model, self._model.source.revision, self._template.digest, self.seed
        )

    def _chunk(self, items: list[tuple[Image, str, int]]) -> tuple[list[Captioned], int]:
        """The captions of one forward pass, and how many images the model broke on."""
        try:
            return [self._captioned(answer) for answer in self._answers(items)], 0
        except UserError:
            raise
        except Exception as error:  # an image too thin for the model, say: each processor has its own types
            if len(items) == 1:
                text = " ".join(str(error).split())[:200]
                return [Captioned("", f"the model failed on it: {type(error).__name__}: {text}")], 1
        singles = [self._chunk([item]) for item in items]
        return [result for (result,), _ in singles], sum(broken for _, broken in singles)

    def _answers(self, items: list[tuple[Image, str, int]]) -> list[Answer]:
        from diffpref.captions.sampling import Decoding, generate

        network = self._model.shared_network(self.device, self.dtype)
        return generate(
            network,
            self._model.inputs([image for image, _, _ in items], [text for _, text, _ in items], network),
            [("caption", row) for _, _, row in items],
            Decoding(self.temperature, self.top_p, self.seed, self.max_new_tokens),
            loading.end_tokens(network, self._model.tokenizer),
        )

    def _captioned(self, answer: Answer) -> Captioned:
        if answer.failure:
            return Captioned("", answer.failure)
        text = self._model.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        return answers.captioned(text, answer.complete)

    def _text(self, prompt: str) -> str:
        """The instruction for an image of this prompt, as the model's chat template wants it."""
        plain = loading.without_special_tokens(prompt[: options.LONGEST], self._model.tokenizer)
        return self._model.asked(self._template.fill(prompt=plain, tokens=self.max_tokens))

    def _too_long(self, size: int) -> str:
        """Why a text of `size` tokens is too long for the model's table of positions, or ""."""
        config = self._model.source.config
        limit = loading.positions(config)
        room = limit - (0 if config.is_encoder_decoder else self.max_new_tokens)
        return (
            f"prompt too long: {size} tokens, the model has room for {room}" if limit and size > room else ""
        )

    @property
    def _model(self) -> ImageTextModel:
        return find_image_text_model(self.model, self.revision)

    @cached_property
    def _template(self) -> Template:
        names = ("prompt", "tokens")
        if self.template:
            found = read_template(self.template, names)
        elif self._model.kind in _OWN_TEMPLATES:
            found = shipped_template(f"caption-{self._model.kind}", names)
        else:
            found = shipped_template("caption" if self._model.chat else "caption-plain", names)
        options.require_asked(self.max_tokens, found)
        return found
