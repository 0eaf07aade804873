"""How alike two captions are in their words, and which words differ.

Both answers come from one thing, the longest common subsequence of words (LCS): similarity is the share of
words in it, and the difference marks the words outside. The order of words counts, since "a red circle left
of a blue square" and "a blue circle left of a red square" have the same words and say different things.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

NEAR_DUPLICATE = 0.9
"""Two captions at least this similar are near-duplicates: at most one word of ten stands in one alone."""
MAX_WORDS = 1000
"""Words of a caption that are compared; bounds the time that a caption of megabytes takes."""

# An ideogram or kana is a word of its own; else a word is what stands between spaces and these marks.
_IDEOGRAM = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_MARKS = r""".,;:!?()\[\]{}<>"“”„«»、。，！？،؛؟"""
_WORD = re.compile(f"[{_IDEOGRAM}]|[^\\s{_MARKS}{_IDEOGRAM}]+")


@dataclass(frozen=True)
class Piece:
    """A stretch of a caption; `differs` when its words are not in the other caption at that place."""

    text: str
    differs: bool

    @property
    def length(self) -> int:
        return len(self.text)


def words(text: str) -> list[str]:
    """The first MAX_WORDS words of a caption in lower case, without punctuation."""
    found: list[str] = _WORD.findall(text.lower())
    return found[:MAX_WORDS]


def similarity(first: Sequence[str], second: Sequence[str]) -> float:
    """2 LCS / (n + m) of two lists of words, in 0..1; 1 for equal ones, empty ones too.

    H. Hyyrö, "Bit-parallel LCS-length computation revisited" (2004): a row of the table is one integer, so
    the cost is that of n additions.
    """
    if first == second:
        return 1.0
    row = _rows(first, second)[-1]
    common = len(second) - row.bit_count()
    return 2 * common / (len(first) + len(second))


def difference(first: str, second: str) -> tuple[list[Piece], list[Piece]]:
    """Both captions in pieces, those words marked that the other lacks. The pieces join to the caption.

    Words beyond MAX_WORDS are not marked.
    """
    left, right = _matches(first), _matches(second)
    keep_left, keep_right = _aligned([m.group().lower() for m in left], [m.group().lower() for m in right])
    return _pieces(first, left, keep_left), _pieces(second, right, keep_right)


def _matches(text: str) -> list[re.Match[str]]:
    return [match for match, _ in zip(_WORD.finditer(text), range(MAX_WORDS), strict=False)]


def _rows(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """Row i of the LCS table of first[:i] as bits over `second`: 0 where the length grows by one."""
    places: dict[str, int] = {}
    for place, word in enumerate(second):
        places[word] = places.get(word, 0) | 1 << place
    mask = (1 << len(second)) - 1
    rows = [mask]
    for word in first:
        row = rows[-1]
        met = row & places.get(word, 0)
        rows.append(((row + met) | (row - met)) & mask)
    return rows


def _aligned(first: Sequence[str], second: Sequence[str]) -> tuple[set[int], set[int]]:
    """Places of a longest common subsequence in both lists."""
    rows = _rows(first, second)
    left, right = set(), set()
    i, j = len(first), len(second)
    while i and j:
        bit = 1 << (j - 1)
        if rows[i] & bit:  # second[j - 1] adds nothing
            j -= 1
        elif rows[i - 1] & bit:  # first[i - 1] made it grow here
            i, j = i - 1, j - 1
            left.add(i)
            right.add(j)
        else:
            i -= 1
    return left, right


def _pieces(text: str, found: list[re.Match[str]], kept: set[int]) -> list[Piece]:
    """What lies between two words is marked where both of them are."""
    pieces, end, before = [], 0, False
    for number, match in enumerate(found):
        differs = number not in kept
        pieces += [Piece(text[end : match.start()], before and differs), Piece(match.group(), differs)]
        end, before = match.end(), differs
    return _joined([*pieces, Piece(text[end:], False)])


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if not piece.text:
            continue
        if joined and joined[-1].differs == piece.differs:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.differs)
        else:
            joined.append(piece)
    return joined
