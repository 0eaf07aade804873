"""The rule-based perturber: words exchanged for others of their kind and form. Needs no weights.

The edits of a level are those of the level below and more: a weak caption lies between the caption and its
medium one. What counts as editable stands in `units.py`, the words in `words/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from diffpref.captions.base import Edit, Level, Perturbed, Provenance, require_level, require_rows
from diffpref.captions.lexicon import OBJECT, ROLES, STYLE, article, lexicon
from diffpref.captions.parsing import DETERMINERS, FUNCTION, Parsed
from diffpref.captions.tags import edit_tags
from diffpref.captions.units import Unit, find_units
from diffpref.seeds import pair_seed

VERSION = 2
"""Of the rules and lists together: raised when a caption comes out another."""
_MASK = (1 << 64) - 1
_ADJECTIVES = frozenset({"color", "size", "texture", "material", "age", "state"})


@dataclass(frozen=True)
class RulePerturber:
    """Exchanges attributes, counts, relations, things and words of style by lists.

    level: weak is one edit, an attribute where there is one; medium a third of the editable facts, things
    last; strong two thirds of them, things early, and two thirds of the words of style. seed: of the
    choices. A caption without a known word has two of its comma-separated tags exchanged or one left out.
    """

    level: Level = field(default="medium", metadata={"help": "how far the caption is changed"})
    seed: int = field(default=0, metadata={"help": "of the choices; every row has a stream of its own"})

    def __post_init__(self) -> None:
        require_level(self.level)

    def __call__(self, captions: Sequence[str], rows: Sequence[int]) -> list[Perturbed]:
        """A perturbed version of each caption; rows: the number of each in its table."""
        require_rows(captions, rows)
        return [self._perturb(caption, row) for caption, row in zip(captions, rows, strict=True)]

    def provenance(self) -> Provenance:
        """The version of the rules and lists, the level and the seed."""
        return Provenance("rules", revision=str(VERSION), seed=self.seed, level=self.level)

    def _perturb(self, text: str, row: int) -> Perturbed:
        draw = _stream(pair_seed(self.seed, "perturb", 0, row))
        caption = Parsed(text)
        units = find_units(caption)
        if not units:
            return edit_tags(text, draw)
        taken = {unit.entry.concept for unit in units}
        edits = []
        chosen = _select(units, self.level, draw)
        for unit in chosen:
            after = _replacement(caption, unit, taken, draw)
            edits.append(Edit(unit.entry.kind, unit.text, after))
            for place in unit.places:
                _write(caption, place, unit.length, after)
        for unit in chosen:
            for place in unit.places:
                _agree(caption, place, unit.length)
        return Perturbed("".join(caption.parts), True, tuple(edits))


def _stream(state: int) -> Callable[[int], int]:
    """draw(n): the next number below n of the stream that starts at `state`; cheaper than random.Random."""

    def draw(n: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) & _MASK
        return (state >> 33) % n

    return draw


def _select(units: list[Unit], level: Level, draw: Callable[[int], int]) -> list[Unit]:
    """The units to edit: those of a weaker level are the first of a stronger one's."""
    shuffled = [unit for _, unit in sorted(((draw(1 << 30), i), unit) for i, unit in enumerate(units))]
    by_tier = sorted(shuffled, key=lambda unit: unit.entry.tier)
    facts = [unit for unit in by_tier if unit.entry.tier != STYLE]
    styles = by_tier[len(facts) :]
    if level == "weak":
        return by_tier[:1]
    third = -(-len(facts or styles) // 3)
    if level == "medium":
        return by_tier[:third]
    rest = sorted(facts[third:], key=lambda unit: unit.entry.tier != OBJECT)
    chosen = (facts[:third] + rest)[: -(-2 * len(facts) // 3)]
    return chosen + styles[: -(-2 * len(styles) // 3)]


def _replacement(caption: Parsed, unit: Unit, taken: set[str], draw: Callable[[int], int]) -> str:
    """What the unit becomes: "" where it is left out, else a word that the caption does not have yet."""
    choices, fate = unit.entry.choices, draw(6)
    if _may_drop(caption, unit) and fate < (3 if unit.entry.kind == "quality" else 1):
        return ""
    concepts = lexicon().concepts
    fresh = [word for word in choices if concepts[word] not in taken] or choices
    after = fresh[draw(len(fresh))]
    taken.add(concepts[after])
    return after


def _may_drop(caption: Parsed, unit: Unit) -> bool:
    """Whether the caption still reads without the unit: an adjective before its noun, or a tag of quality."""
    start, end = unit.places[0], unit.places[0] + unit.length
    before, behind = caption.gap(start), caption.gap(end)
    if unit.entry.kind == "quality":
        return before == ", " and (not behind or behind[0] == ",")
    if unit.entry.kind not in _ADJECTIVES or before != " " or behind != " " or end == len(caption.words):
        return False
    return caption.lower[start - 1] in DETERMINERS and caption.lower[end] not in FUNCTION


def _write(caption: Parsed, place: int, length: int, after: str) -> None:
    """Put `after` in the place of `length` words, capitalised as the first; "" takes a gap along."""
    parts = caption.parts
    slot, end = 2 * place + 1, 2 * (place + length)
    parts[slot:end] = [_like(caption.words[place : place + length], after), *[""] * (end - slot - 1)]
    if not after:
        parts[slot - 1 if parts[slot - 1] == ", " else end] = ""


def _like(models: list[str], text: str) -> str:
    """`text` with the capitals of the words `models`: all, the first letter of the first or of each word."""
    first, last = models[0], models[-1]
    if first.islower():
        return text
    if first.isupper() and len(first) > 1:
        return text.upper()
    if len(models) > 1 and last[0].isupper():
        return " ".join(word[:1].upper() + word[1:] for word in text.split(" "))
    return text[:1].upper() + text[1:] if first[0].isupper() else text


def _agree(caption: Parsed, place: int, length: int) -> None:
    """Make the article before the edited words at `place` agree with what follows it now."""
    before = 2 * place - 1
    if before < 0 or caption.lower[place - 1] not in ROLES["article"] or not caption.gap(place).isspace():
        return
    following = caption.parts[before + 2] or caption.parts[before + 2 + 2 * length]
    right, old = article(following), caption.parts[before]
    if old.lower() != right:
        shout = following.isupper() and len(following) > 1
        caption.parts[before] = right if old.islower() else right.upper() if shout else right.capitalize()
