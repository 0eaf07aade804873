from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from diffpref.captions.conflict import Cosines, Texts, conflict, measure
from diffpref.captions.statistics import (
    Repeats,
    Smallest,
    bin_lengths,
    length_edges,
    length_summary,
    unit_bin,
)
from diffpref.captions.wording import MAX_WORDS, Piece, difference, similarity, words


def common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence by the textbook's table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_words_are_lower_case_without_punctuation_and_ideograms_stand_alone() -> None:
    assert words("A red-hot cat's «tail», (8k:1.2)!") == ["a", "red-hot", "cat's", "tail", "8k", "1", "2"]
    assert words("赤い cat") == ["赤", "い", "cat"]
    assert words("👩‍👩‍👧 and قطة، حمراء") == ["👩‍👩‍👧", "and", "قطة", "حمراء"]
    assert words(" ,. ") == []


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a red circle", "a blue circle", 4 / 6),
        ("A red circle!", "a red circle", 1.0),
        ("a red circle left of a blue square", "a blue circle left of a red square", 12 / 16),
        ("a cat", "two dogs", 0.0),
        ("a cat", "a cat on a mat", 4 / 7),
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_similarity_counts_words_in_order(first: str, second: str, expected: float) -> None:
    assert similarity(words(first), words(second)) == expected
    assert similarity(words(second), words(first)) == expected


def test_difference_marks_what_the_other_caption_lacks() -> None:
    first, second = difference("a red circle, left of a blue square!", "a big green circle left of a square")
    assert first == [
        Piece("a ", False), Piece("red", True), Piece(" circle, left of a ", False), Piece("blue", True),
        Piece(" square!", False),
    ]  # fmt: skip
    assert second == [
        Piece("a ", False), Piece("big green", True), Piece(" circle left of a square", False)
    ]  # fmt: skip


def test_similarity_is_the_unmarked_share_and_pieces_join_to_the_caption() -> None:
    draw = random.Random(0)
    for _ in range(400):
        lists = [[draw.choice("abcd") for _ in range(draw.randint(0, 12))] for _ in range(2)]
        texts = [draw.choice([" ", ", ", "  "]).join(one) + draw.choice(["", "!", " "]) for one in lists]
        pieces = difference(*texts)
        assert ["".join(piece.text for piece in one) for one in pieces] == texts
        unmarked = [[w for p in one if not p.differs for w in words(p.text)] for one in pieces]
        assert unmarked[0] == unmarked[1]
        assert len(unmarked[0]) == common(*lists)
        if any(lists):
            assert similarity(*lists) == 2 * common(*lists) / (len(lists[0]) + len(lists[1]))


def test_captions_of_a_megabyte_are_compared_by_their_beginning() -> None:
    caption = " ".join(f"w{n}" for n in range(200_000))
    assert len(words(caption)) == MAX_WORDS
    first, _ = difference(caption, "else " + caption)
    assert "".join(piece.text for piece in first) == caption
    assert first[-1].text.endswith("w199999")


def test_length_summary_by_hand() -> None:
    lengths = Counter({5: 6, 10: 3, 78: 1})
    assert length_summary(lengths, 77) == {
        "count": 10, "mean": (30 + 30 + 78) / 10, "median": 5, "p95": 78, "max": 78, "cut": 1,
        "cut_share": 0.1,
    }  # fmt: skip
    assert length_summary(Counter({77: 2}), 77)["cut"] == 0
    assert length_summary(Counter(), 77) == {"count": 0}


@pytest.mark.parametrize("longest", [5, 77, 78, 90, 130, 3000])
def test_no_bin_of_lengths_straddles_the_limit(longest: int) -> None:
    draw = random.Random(longest)
    lengths = Counter(draw.randint(3, longest) for _ in range(1000))
    edges = length_edges(lengths, 77)
    assert edges[0] == 0
    assert 78 in edges
    assert len(edges) <= 33
    assert len({b - a for a, b in itertools.pairwise(edges[1:])}) == 1
    counts = bin_lengths(lengths, edges)
    assert sum(counts) == 1000
    assert sum(counts[edges.index(78) :]) == sum(n for value, n in lengths.items() if value > 77)


def test_one_very_long_caption_does_not_squeeze_the_others() -> None:
    lengths = Counter({20: 999, 5000: 1})
    edges = length_edges(lengths, 77)
    assert edges[-1] < 120
    assert bin_lengths(lengths, edges)[-1] == 1


def test_unit_bins_have_their_lower_edge() -> None:
    assert [unit_bin(value) for value in (0.0, 0.049, 0.05, 0.55, 0.9, 0.95, 1.0)] == [
        0,
        0,
        1,
        11,
        18,
        19,
        19,
    ]
    assert all(unit_bin(n / 20) == n for n in range(20))


def test_repeats_are_exact_while_they_fit() -> None:
    repeats = Repeats()
    for text in ["a", "b", "a", "c", "b", "a"]:
        repeats.add(text)
    assert repeats.summary() == {
        "exact": True, "distinct": 3, "repeated": 5, "share": 5 / 6,
        "most": [{"text": "a", "count": 3}, {"text": "b", "count": 2}],
    }  # fmt: skip
    assert Repeats().summary()["share"] == 0.0


def test_repeats_stay_small_and_estimate_well_beyond() -> None:
    """20,000 distinct texts, each fourth of which comes three times: 30,000 occurrences, half repeated."""
    repeats = Repeats(held=2048)
    for n in range(20_000):
        for _ in range(3 if n % 4 == 0 else 1):
            repeats.add(f"text {n}")
            assert len(repeats.counts) <= 2048
    found = repeats.summary()
    assert not found["exact"]
    assert found["distinct"] == pytest.approx(20_000, rel=0.12)
    assert found["share"] == pytest.approx(0.5, abs=0.06)


def test_the_smallest_keys_win_in_any_order() -> None:
    keys = list(range(100))
    random.Random(1).shuffle(keys)
    kept: Smallest[str] = Smallest(5)
    for key in keys:
        kept.add(key, f"item {key}")
    assert kept.items() == [f"item {n}" for n in range(5)]
    none: Smallest[int] = Smallest(0)
    none.add(1, 1)
    assert none.items() == []


class Vectors:
    """Embeddings written down by hand: points of the unit circle in degrees, by text and by red."""

    def __init__(self, texts: dict[str, float]) -> None:
        self.texts = texts

    @staticmethod
    def _points(degrees: list[float]) -> torch.Tensor:
        return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return self._points([self.texts[text] for text in texts])

    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        return self._points([float(image.getpixel((0, 0))[0]) for image in images])


def at(degrees: int) -> Image.Image:
    return Image.new("RGB", (2, 2), (degrees, 0, 0))


def test_conflict_of_hand_made_embeddings() -> None:
    encoder = Vectors({"w": 10.0, "l": 80.0, "p": 45.0, "": 0.0})
    pairs = [
        (Texts("p", "w", "l"), at(0), at(90)),  # both captions fit their own image better
        (Texts("p", "l", "w"), at(0), at(90)),  # both the other one
        (Texts("p", "w", "w"), at(0), at(90)),  # one caption for both: right once, wrong once
        (Texts("p", "p", "p"), at(0), at(90)),  # as far from both images: ties
    ] * 6  # 24 pairs are more than a batch
    cosines = measure(encoder, pairs)
    cos = {d: math.cos(math.radians(d)) for d in (10, 45, 80)}
    assert cosines.winner_own[:4] == pytest.approx([cos[10], cos[80], cos[10], cos[45]], abs=1e-6)
    assert cosines.winner_other[:4] == pytest.approx([cos[80], cos[10], cos[80], cos[45]], abs=1e-6)
    assert cosines.loser_own[:4] == pytest.approx([cos[10], cos[80], cos[80], cos[45]], abs=1e-6)
    assert cosines.loser_other[:4] == pytest.approx([cos[80], cos[10], cos[10], cos[45]], abs=1e-6)
    found = conflict(cosines, range(24))
    assert found["winner"]["value"] == (0 + 1 + 0 + 0.5) / 4
    assert found["loser"]["value"] == (0 + 1 + 1 + 0.5) / 4
    assert found["conflict"]["value"] == 0.5
    assert found["own_minus_other"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert found["overlap_prompt"]["value"] == 0.5
    assert found["overlap_caption"]["value"] == (0.5 + 0.5 + 0 + 0.5) / 4
    low, high = found["conflict"]["interval"]
    assert 0.3 < low < 0.5 < high < 0.7
    assert sum(found["similarity"]["loser_own"]["counts"]) == 24


def cosines_of(own: list[float], other: list[float]) -> Cosines:
    one, two = np.array(own), np.array(other)
    nothing = np.full(len(own), np.nan)
    return Cosines(one, two, one, two, nothing, nothing)


def test_the_unit_is_the_prompt() -> None:
    """Nine pairs of one prompt and one of another weigh the same, and the interval knows two units."""
    found = conflict(cosines_of([1.0] * 9 + [0.0], [0.5] * 10), [7] * 9 + [8])
    assert (found["units"], found["pairs"]) == (2, 10)
    assert found["conflict"]["value"] == 0.5
    assert found["conflict"]["interval"] == [0.0, 1.0]
    assert "overlap_prompt" not in found
    assert "prompt_winner" not in found["similarity"]


def test_one_prompt_has_no_interval() -> None:
    found = conflict(cosines_of([0.3], [0.2]), [7])
    assert found["conflict"] == {"value": 0.0, "interval": None}
