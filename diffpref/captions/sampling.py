"""Generation in which the answer to a row does not depend on its batch-mates, sampled or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from diffpref.errors import UserError
from diffpref.seeds import pair_seed

_MASK = (1 << 64) - 1


class Decoding(NamedTuple):
    """How tokens are chosen. temperature 0 takes the likeliest; seed: of the rows' streams."""

    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int


class Answer(NamedTuple):
    """New tokens of a row without its end token. complete: it ended by itself. failure: why it is none."""

    tokens: list[int]
    complete: bool
    failure: str = ""


def generate(
    model: Any, inputs: Any, streams: Sequence[tuple[str, int]], decoding: Decoding, ends: frozenset[int]
) -> list[Answer]:
    """The model's answer to each row of a padded batch.

    inputs: a mapping of tensors, `input_ids` [B, N] among them, padded on the left for decoders. streams: the
    name and number of each row's random stream. ends: tokens that end an answer. Raises UserError when memory
    runs out.
    """
    choice = _Choice(streams, decoding)
    inputs = {name: _at(value, model) for name, value in inputs.items()}
    try:
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=decoding.max_new_tokens,
                do_sample=False,
                num_beams=1,
                logits_processor=[choice],
            )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the model has no memory for {len(streams)} rows at a time",
            why=str(error).splitlines()[0],
            fix="lower batch_size, or take a smaller model or precision",
        ) from error
    start = 1 if model.config.is_encoder_decoder else _prompt_length(inputs["input_ids"], output)
    bad = choice.bad.tolist()
    return [_answer(row, ends, bad[i]) for i, row in enumerate(output[:, start:].tolist())]


def _at(value: torch.Tensor, model: Any) -> torch.Tensor:
    """A tensor where the model is, and in its precision."""
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


def padded(ids: Sequence[Sequence[int]], fill: int, left: bool) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of texts, int64 [B, N]; `fill` is the padding token."""
    longest = max(map(len, ids))
    tokens = torch.full((len(ids), longest), fill)
    mask = torch.zeros_like(tokens)
    for i, text in enumerate(ids):
        place = slice(longest - len(text), None) if left else slice(len(text))
        tokens[i, place] = torch.tensor(text)
        mask[i, place] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def _prompt_length(prompt: torch.Tensor, output: torch.Tensor) -> int:
    """How many tokens the output repeats from the prompt.

    All of them for most decoders; BLIP leaves out the last, and replaces the first by one of its own.
    """
    for length in (prompt.shape[1], prompt.shape[1] - 1):
        if output.shape[1] >= length and bool((output[:, 1:length] == prompt[:, 1:length]).all()):
            return length
    return 0


def _answer(row: list[int], ends: frozenset[int], bad: bool) -> Answer:
    if bad:
        return Answer([], True, "the model computed NaN: it may need another dtype")
    for place, token in enumerate(row):
        if token in ends:
            return Answer(row[:place], True)
    return Answer(row, False)


class _Choice:
    """Leaves one token a row: a logits processor, so that transformers' own loop does the rest.

    bad: bool [B], whether a row had NaN anywhere.
    """

    def __init__(self, streams: Sequence[tuple[str, int]], decoding: Decoding) -> None:
        self.decoding = decoding
        self.states = [pair_seed(decoding.seed, name, 0, row) for name, row in streams]
        self.step = 0
        self.bad = torch.zeros(len(streams), dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.bad = self.bad.to(scores.device) | scores.isnan().any(dim=1)
        if self.decoding.temperature == 0:
            return scores
        numbers = [uniform(state, self.step) for state in self.states]
        self.step += 1
        token = draw(scores, numbers, self.decoding.temperature, self.decoding.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def draw(scores: torch.Tensor, numbers: Sequence[float], temperature: float, top_p: float) -> torch.Tensor:
    """A token of each row, int64 [B], by inversion of its distribution at a number in [0, 1) for each row.

    scores: logits [B, V]. The distribution is the softmax at `temperature`, cut to the likeliest tokens that
    together reach `top_p` (nucleus sampling, Holtzman et al., arXiv 1904.09751). The tokens keep the order of
    the vocabulary, so that two of almost equal logits may change places in rank without changing the draw.
    """
    wide = torch.float32 if scores.device.type == "mps" else torch.float64  # mps has no other
    share = torch.softmax(scores.to(wide) / temperature, dim=-1)
    if top_p < 1:
        ranked, order = share.sort(dim=-1, descending=True, stable=True)
        cut = ranked.cumsum(dim=-1) - ranked >= top_p
        share = share.scatter(1, order, ranked.masked_fill(cut, 0.0))
    total = share.cumsum(dim=-1)
    target = torch.tensor(numbers, dtype=wide, device=scores.device)[:, None] * total[:, -1:]
    found = torch.searchsorted(total, target, right=True)[:, 0]
    last = (total < total[:, -1:]).sum(dim=-1)  # where rounding carries the target to the end
    return torch.minimum(found, last)


def uniform(state: int, step: int) -> float:
    """Number `step` of the stream that `state` begins, in [0, 1): splitmix64 (Steele et al., 2014)."""
    z = (state + (step + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)
