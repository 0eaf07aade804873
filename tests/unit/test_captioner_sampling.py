"""Drawing tokens: exact nucleus sampling from a stream for each row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpref.captions.sampling import draw, padded, uniform


def draws(logits: list[float], temperature: float, top_p: float, count: int = 20_000) -> np.ndarray:
    """Shares of the tokens over evenly spread numbers: the distribution itself, to 1 / count."""
    scores = torch.tensor([logits]).expand(count, -1)
    numbers = [(i + 0.5) / count for i in range(count)]
    tokens = draw(scores, numbers, temperature, top_p)
    return np.bincount(tokens.numpy(), minlength=len(logits)) / count


def by_hand(logits: list[float], temperature: float, top_p: float) -> np.ndarray:
    """The likeliest tokens whose probabilities reach top_p, in plain numpy."""
    share = np.exp(np.array(logits) / temperature)
    share /= share.sum()
    kept, total = np.zeros(len(logits)), 0.0
    for token in sorted(range(len(logits)), key=lambda token: -share[token]):
        if total >= top_p:
            break
        kept[token] = share[token]
        total += share[token]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.75, 0.9, 1.0])
def test_the_distribution_is_the_nucleus(temperature, top_p):
    logits = [0.3, -1.0, 2.0, 1.9, -4.0, 0.0, 1.0]
    assert np.abs(draws(logits, temperature, top_p) - by_hand(logits, temperature, top_p)).max() < 2e-4


def test_exact_shares_and_masked_tokens():
    half = [float(np.log(0.5)), float(np.log(0.25)), float(np.log(0.25)), -np.inf]
    assert draws(half, 1.0, 1.0).tolist() == [0.5, 0.25, 0.25, 0.0]
    assert draws(half, 1.0, 0.4).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_transformers_own_nucleus_keeps_the_same_tokens():
    from transformers import TopPLogitsWarper

    scores = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)) * 3
    theirs = TopPLogitsWarper(top_p=0.75)(None, scores)
    numbers = [(i + 0.5) / 50 for i in range(50)]
    tokens = draw(scores, numbers, 1.0, 0.75)
    assert torch.isfinite(theirs.gather(1, tokens[:, None])).all()
    for row in range(50):
        reached = draw(scores[row].expand(4000, -1), [(i + 0.5) / 4000 for i in range(4000)], 1.0, 0.75)
        assert set(reached.tolist()) <= set(torch.isfinite(theirs[row]).nonzero().flatten().tolist())


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_are_tokens_of_the_nucleus(number):
    scores = torch.tensor([[-np.inf, 1.0, 0.5, -np.inf], [3.0, -np.inf, -np.inf, -np.inf]])
    tokens = draw(scores, [number, number], 1.0, 1.0)
    assert tokens.tolist() == [1 if number == 0 else 2, 0]


def test_a_row_s_draw_does_not_depend_on_its_batch_mates():
    scores = torch.randn(6, 100, generator=torch.Generator().manual_seed(1))
    numbers = [uniform(7, step) for step in range(6)]
    together = draw(scores, numbers, 0.8, 0.9)
    assert together.tolist() == [
        draw(scores[i : i + 1], numbers[i : i + 1], 0.8, 0.9).item() for i in range(6)
    ]


def test_streams_are_even_and_apart():
    numbers = np.array([[uniform(state, step) for step in range(200)] for state in range(50)])
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    assert np.abs(np.histogram(numbers, bins=10, range=(0, 1))[0] / numbers.size - 0.1).max() < 0.02
    assert np.abs(np.corrcoef(numbers) - np.eye(50)).max() < 0.4
    # splitmix64 from state 0, as published: its first output is 0xE220A8397B1DCDAF
    assert uniform(0, 0) == (0xE220A8397B1DCDAF >> 11) / 2**53


def test_padding_is_on_the_side_asked_for():
    left = padded([[5, 6, 7], [8]], fill=0, left=True)
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert padded([[5, 6, 7], [8]], fill=9, left=False)["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
