"""Perturbed captions by an instruction-following language model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from diffpref.captions import answers, options
from diffpref.captions.base import Level, Perturbed, Provenance, require_rows
from diffpref.captions.templates import Template, instruction
from diffpref.config.schema import option
from diffpref.errors import UserError
from diffpref.language_models import loading

if TYPE_CHECKING:
    from diffpref.captions.sampling import Answer


@dataclass(frozen=True, kw_only=True)
class TransformersPerturber:
    """A chat model in this process, told to rewrite the caption."""

    level: Level = options.level_option()
    model: str = option(help="folder or hub id of an instruction-following model with a chat template")
    revision: str = options.revision_option()
    template: str = options.instruction_option()
    max_new_tokens: int = options.new_tokens_option(256)
    temperature: float = options.temperature_option(0.7)
    top_p: float = options.top_p_option(0.95)
    batch_size: int = options.batch_size_option()
    device: str = options.device_option()
    dtype: str = options.dtype_option()
    seed: int = options.seed_option()

    def __post_init__(self) -> None:
        options.require_valid(self, "perturber")
        options.require_sampling(self.temperature, self.top_p, "perturber")
        _ = self._template

    def __call__(self, captions: Sequence[str], rows: Sequence[int]) -> list[Perturbed]:
        """A rewritten version of each caption. Raises UserError where the model cannot be had."""
        require_rows(captions, rows)
        results = [Perturbed(caption, False, failure=options.too_long(caption)) for caption in captions]
        plain = ["" if results[i].failure else self._plain(caption) for i, caption in enumerate(captions)]
        ids = {i: self._ids(text) for i, text in enumerate(plain) if options.has_words(text)}
        limit = loading.positions(self._source.config) if ids else 0
        for i in [i for i, tokens in ids.items() if limit and len(tokens) > limit - self.max_new_tokens]:
            failure = f"caption too long: {len(ids.pop(i))} tokens with the instruction, of {limit}"
            results[i] = Perturbed(captions[i], False, failure=failure)
        order = sorted(ids, key=lambda i: len(ids[i]))
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            found = self._answers([ids[i] for i in chunk], [rows[i] for i in chunk])
            for i, answer in zip(chunk, found, strict=True):
                results[i] = self._perturbed(answer, captions[i])
        return results

    def provenance(self) -> Provenance:
        """The commit of the hub, or a hash of the folder; loads no weights."""
        return Provenance(
            "transformers", self.model, self._source.revision, self._template.digest, self.seed, self.level
        )

    def reach(self) -> None:
        """Load the model, or raise UserError where it cannot be had."""
        _ = self._tokenizer, self._network

    def _answers(self, ids: list[list[int]], rows: list[int]) -> list[Answer]:
        from diffpref.captions.sampling import Decoding, generate, padded

        network = self._network
        ends = loading.end_tokens(network, self._tokenizer)
        return generate(
            network,
            padded(ids, self._tokenizer.pad_token_id, left=True),
            [("perturb", row) for row in rows],
            Decoding(self.temperature, self.top_p, self.seed, self.max_new_tokens),
            ends,
        )

    def _perturbed(self, answer: Answer, caption: str) -> Perturbed:
        if answer.failure:
            return Perturbed(caption, False, failure=answer.failure)
        text = self._tokenizer.decode(answer.tokens, skip_special_tokens=True)
        return answers.perturbed(text, caption, answer.complete)

    def _plain(self, caption: str) -> str:
        return loading.without_special_tokens(caption, self._tokenizer) if options.has_words(caption) else ""

    def _ids(self, caption: str) -> list[int]:
        turn = [{"role": "user", "content": self._template.fill(caption=caption, level=self.level)}]
        text = self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def _network(self) -> Any:
        place, commit = self._source.place, self._source.commit
        return loading.shared_network("AutoModelForCausalLM", place, commit, self.device, self.dtype)

    @property
    def _source(self) -> loading.Source:
        return loading.find_source(self.model, self.revision)

    @property
    def _tokenizer(self) -> Any:
        tokenizer = loading.load_processor("AutoTokenizer", self._source.place, self._source.commit)
        if not tokenizer.chat_template:
            raise UserError(
                f"{self.model} has no chat template",
                why="a model that follows instructions brings one with its tokenizer",
                fix="give its -Instruct or -chat version",
            )
        return tokenizer

    @cached_property
    def _template(self) -> Template:
        return instruction(self.template, self.level)
