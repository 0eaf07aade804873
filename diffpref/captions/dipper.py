"""Captions paraphrased by DIPPER (Krishna et al., arXiv 2303.13408), as DCPO does, or by another T5."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from diffpref.captions import answers, options
from diffpref.captions.base import Level, Perturbed, Provenance, require_rows
from diffpref.captions.templates import Template, level_template, shipped_template
from diffpref.config.schema import option
from diffpref.errors import UserError
from diffpref.language_models import loading
from diffpref.paths import resolve_or_hub_id

DIPPER = "kalpeshk2011/dipper-paraphraser-xxl"
DIPPER_TOKENIZER = "google/t5-v1_1-xxl"  # DIPPER's own repository holds none
DIVERSITY: dict[Level, int] = {"weak": 40, "medium": 60, "strong": 80}
READS = 512
"""Tokens that T5 was trained to read."""
_PLACEHOLDERS = ("caption", "context", "lexical", "level")
_SENTENCE = re.compile(r"""(?:(?<=[.!?…])|(?<=[.!?…]["”’')\]]))\s+(?=["“‘'(\[]?[A-Z0-9])""")


@dataclass
class _Work:
    """A caption on its way: its windows of sentences, and what became of those that are done."""

    place: int
    windows: list[str]
    row: int
    done: list[str] = field(default_factory=list)
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class DipperPerturber:
    """A T5 paraphraser in this process.

    DIPPER reads "lexical = L, order = O CONTEXT <sent> TEXT </sent>". Its codes count likeness: L is 100
    minus the lexical diversity, which DCPO (arXiv 2502.06023) sets to 40, 60 and 80 for weak, medium and
    strong; O is 100, for an order diversity of 0. Three sentences are TEXT at a time; CONTEXT is the
    instruction of DCPO's release, and after it what became of the sentences before; tokens are drawn with
    top_p 0.75, as in the release. An answer ends after twice the tokens of its TEXT plus 16 at the latest.
    """

    level: Level = options.level_option()
    model: str = option(DIPPER, help="folder or hub id of a T5 paraphraser; DIPPER has 11B parameters")
    revision: str = options.revision_option()
    tokenizer: str = option(
        "", help=f"folder or hub id of its tokenizer; empty: the model's own, for DIPPER {DIPPER_TOKENIZER}"
    )
    template: str = option(
        "",
        help="file with the model's input ({caption}, {context}, {lexical}, {level}); {level} in its name "
        "picks a file for each level; empty: DIPPER's format with DCPO's instruction",
    )
    sentences: int = option(
        3, bounds="[1, inf)", help="sentences of a caption that are paraphrased at a time"
    )
    max_new_tokens: int = options.new_tokens_option(256)
    temperature: float = options.temperature_option(1.0)
    top_p: float = options.top_p_option(0.75)
    batch_size: int = options.batch_size_option()
    device: str = options.device_option()
    dtype: str = options.dtype_option()
    seed: int = options.seed_option()

    def __post_init__(self) -> None:
        options.require_valid(self, "perturber")
        options.require_sampling(self.temperature, self.top_p, "perturber")
        _ = self._template

    def __call__(self, captions: Sequence[str], rows: Sequence[int]) -> list[Perturbed]:
        """A paraphrase of each caption. Raises UserError where the model cannot be had."""
        require_rows(captions, rows)
        work = [
            _Work(place, windows, rows[place])
            for place, caption in enumerate(captions)
            if (windows := self._windows(caption))
        ]
        for step in range(max((len(item.windows) for item in work), default=0)):
            self._advance([item for item in work if step < len(item.windows) and not item.failure], step)
        results = [Perturbed(caption, False, failure=options.too_long(caption)) for caption in captions]
        for item in work:
            caption = captions[item.place]
            results[item.place] = (
                Perturbed(caption, False, failure=item.failure)
                if item.failure
                else answers.perturbed(" ".join(item.done), " ".join(caption.split()))
            )
        return [
            result if result.changed else result._replace(text=caption)
            for result, caption in zip(results, captions, strict=True)
        ]

    def provenance(self) -> Provenance:
        """The commit of the hub, or a hash of the folder; loads no weights."""
        revision = loading.find_source(self.model, self.revision).revision
        return Provenance("dipper", self.model, revision, self._template.digest, self.seed, self.level)

    def reach(self) -> None:
        """Load the model, or raise UserError where it cannot be had."""
        _ = self._tokenizer, self._network

    def _windows(self, caption: str) -> list[str]:
        """The sentences of a caption, a few at a time; none where there is nothing to paraphrase."""
        if not options.has_words(caption) or options.too_long(caption):
            return []
        plain = loading.without_special_tokens(caption, self._tokenizer)
        if not options.has_words(plain):
            return []
        sentences = _SENTENCE.split(" ".join(plain.split()))
        return [
            " ".join(sentences[start : start + self.sentences])
            for start in range(0, len(sentences), self.sentences)
        ]

    def _advance(self, work: list[_Work], step: int) -> None:
        """Paraphrase window `step` of each item."""
        ids = {id(item): self._ids(item, step) for item in work}
        fits = [item for item in work if not item.failure]
        order = sorted(fits, key=lambda item: len(ids[id(item)]))
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            self._paraphrase(chunk, [ids[id(item)] for item in chunk], step)

    def _ids(self, item: _Work, step: int) -> list[int]:
        """The tokens that the model reads for window `step`; as much context as fits, the nearest first."""
        for first in range(step + 1):
            text = self._template.fill(
                caption=item.windows[step],
                context=" ".join(item.done[first:]),
                lexical=100 - DIVERSITY[self.level],
                level=self.level,
            )
            ids: list[int] = self._tokenizer(" ".join(text.split()))["input_ids"]
            if len(ids) <= READS:
                return ids
        item.failure = f"caption too long: {len(ids)} tokens, the model reads {READS}"
        return ids

    def _paraphrase(self, work: list[_Work], ids: list[list[int]], step: int) -> None:
        from diffpref.captions.sampling import Decoding, generate, padded

        network = self._network
        ends = loading.end_tokens(network, self._tokenizer)
        inputs = padded(ids, self._tokenizer.pad_token_id, left=False)
        limits = [
            min(self.max_new_tokens, 2 * len(self._tokenizer(item.windows[step])["input_ids"]) + 16)
            for item in work
        ]
        found = generate(
            network,
            inputs,
            [(f"paraphrase {step}", item.row) for item in work],
            Decoding(self.temperature, self.top_p, self.seed, max(limits)),
            ends,
        )
        for item, answer, limit in zip(work, found, limits, strict=True):
            item.failure = answer.failure
            complete = answer.complete and len(answer.tokens) <= limit
            text = self._tokenizer.decode(answer.tokens[:limit], skip_special_tokens=True).strip()
            item.done.append(text if complete else answers.cut_short(text))

    @property
    def _network(self) -> Any:
        source = loading.find_source(self.model, self.revision)
        return loading.shared_network(
            "AutoModelForSeq2SeqLM", source.place, source.commit, self.device, self.dtype
        )

    @property
    def _tokenizer(self) -> Any:
        if self.tokenizer or self.model == DIPPER:
            name = self.tokenizer or DIPPER_TOKENIZER
            return loading.load_processor("AutoTokenizer", str(resolve_or_hub_id(name, "tokenizer")), None)
        source = loading.find_source(self.model, self.revision)
        if not source.config.is_encoder_decoder:
            raise UserError(
                f"{self.model} is no T5", why=f"its type is {source.config.model_type!r}",
                fix="--perturber transformers is for models that follow instructions",
            )  # fmt: skip
        return loading.load_processor("AutoTokenizer", source.place, source.commit)

    @cached_property
    def _template(self) -> Template:
        if self.template:
            return level_template(self.template, self.level, _PLACEHOLDERS)
        return shipped_template("dipper", _PLACEHOLDERS)
