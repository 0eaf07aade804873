"""What of a caption can be edited: words of the lists that mean here what the lists take them for."""

from __future__ import annotations

from typing import NamedTuple

from diffpref.captions.lexicon import FIXED, OBJECT, PEOPLE, ROLES, STYLE, Entry, lexicon
from diffpref.captions.parsing import DETERMINERS, FUNCTION, Parsed

_ATTRIBUTIVE = frozenset({"material", "size", "texture"})


_NOTHING = Entry(FIXED, STYLE, (), False, "")


class Unit(NamedTuple):
    """An editable fact: `length` words from each of `places` on, all the same word of entry `entry`."""

    places: list[int]
    length: int
    text: str
    entry: Entry


def find_units(caption: Parsed) -> list[Unit]:
    """The editable units of a caption, in its order. A thing named twice is one unit, edited alike.

    Words set apart by brackets or quotes count only where there is nothing else.
    """
    known = lexicon().first
    units: dict[object, Unit] = {}
    apart: dict[object, Unit] = {}
    done = 0
    for i, word in enumerate(caption.lower):
        if i < done or word not in known:
            continue
        length, entry = _read(caption, i)
        done = i + length
        if entry.choices:
            _add(apart if i in caption.apart else units, caption, i, length, entry)
    return list((units or apart).values())


def _add(units: dict[object, Unit], caption: Parsed, i: int, length: int, entry: Entry) -> None:
    text = " ".join(caption.lower[i : i + length])
    key: object = text if entry.tier == OBJECT else i
    if key in units:
        units[key].places.append(i)
    else:
        units[key] = Unit([i], length, text, entry)


def _read(caption: Parsed, i: int) -> tuple[int, Entry]:
    """What stands at place `i`: the words it takes and their entry, one without choices if it stays."""
    found = _entry_at(caption, i)
    if found is None:
        return 1, _NOTHING
    length, entry = found
    if entry.kind == FIXED or _is_meant(caption, i, length, entry):
        return length, entry
    other = lexicon().second.get(caption.lower[i]) if length == 1 else None
    return (1, other) if other and _is_meant(caption, i, 1, other) else (1, _NOTHING)


def _entry_at(caption: Parsed, i: int) -> tuple[int, Entry] | None:
    """The longest set phrase or the word at place `i`: its length and its entry."""
    index, lower = lexicon(), caption.lower
    for tail, entry in index.phrases.get(lower[i], ()):
        end = i + 1 + len(tail)
        if tuple(lower[i + 1 : end]) == tail and all(caption.gap(k) == " " for k in range(i + 1, end)):
            return 1 + len(tail), entry
    entry_of_word = index.words.get(lower[i])
    return None if entry_of_word is None else (1, entry_of_word)


def _is_meant(caption: Parsed, i: int, length: int, entry: Entry) -> bool:
    """Whether the words at `i` are used as their entry says, and are no part of a name."""
    if any(caption.is_name(k) or k in caption.authors for k in range(i, i + length)):
        return False
    kind, word = entry.kind, caption.lower[i]
    if word in ROLES["measured"] and i and caption.lower[i - 1] in ROLES["measure"] and caption.gap(i) == " ":
        return False
    if kind == "color" and length == 1:
        return _is_color(caption, i)
    if word == "short" and "tall" in entry.choices:
        near = {_next(caption, i + 1), _next(caption, i + 2)}
        return near.isdisjoint(ROLES["lengthwise"]) and _next(caption, i + 1) not in FUNCTION
    if kind in _ATTRIBUTIVE:
        return _next(caption, i + length) not in FUNCTION
    if kind == "age":
        return _describes_person(caption, i)
    if kind == "count":
        return (word[0].isdigit() and word[-1].isalpha()) or _counts(caption, i, length)
    if kind == "relation":
        following = _next(caption, i + length)
        return following in DETERMINERS and (i == 0 or caption.lower[i - 1] not in ("from", "the"))
    if kind == "medium" or kind == "motion":
        return not (word.endswith("ing") and _next(caption, i + length) in DETERMINERS)
    if word == "orange":
        return _is_fruit(caption, i)
    if entry.tier == OBJECT and _next(caption, i + length) in ROLES["possessive"]:
        return False
    if entry.tier == OBJECT and i > 1 and caption.lower[i - 1] == "the":  # "Kermit the frog"
        return not (caption.words[i - 2][0].isupper() and caption.lower[i - 2] not in FUNCTION)
    return True


def _next(caption: Parsed, i: int) -> str:
    """Word `i` in lower case where a space stands before it, else "of": an end to any phrase."""
    return caption.lower[i] if i < len(caption.lower) and caption.gap(i) == " " else "of"


def _is_person(caption: Parsed, i: int) -> bool:
    word = _next(caption, i)
    entry = lexicon().words.get(word)
    return entry.kind in PEOPLE if entry else word in ROLES["human"]


def _describes_person(caption: Parsed, i: int) -> bool:
    """Whether a person is the first thing within four words: "old bearded japanese man"."""
    words = lexicon().words
    for k in range(i + 1, i + 5):
        if _is_person(caption, k):
            return True
        word = _next(caption, k)
        if (word in FUNCTION and word != "and") or (word in words and words[word].tier == OBJECT):
            return False
    return False


def _is_color(caption: Parsed, i: int) -> bool:
    """Not a skin ("a black man"), and "orange" only where it is no fruit."""
    word = caption.lower[i]
    if word in ROLES["skin"] and _is_person(caption, i + 1):
        return False
    following = _next(caption, i + 1)
    if word != "orange":
        return following != "style"  # "alex grey style"
    if (i and caption.lower[i - 1] in ROLES["predicative"]) or _is_paired(caption, i):
        return True
    return following not in FUNCTION and following not in ROLES["fruit"] and not following.endswith("ing")


def _is_paired(caption: Parsed, i: int) -> bool:
    """Whether "and" stands between word `i` and a colour: "orange and teal"."""
    words = lexicon().words
    pairs = ((i + 1, i + 2), (i - 1, i - 2))
    near = [b for a, b in pairs if 0 <= b < len(caption.lower) and caption.lower[a] == "and"]
    return any(caption.lower[b] in words and words[caption.lower[b]].kind == "color" for b in near)


def _is_fruit(caption: Parsed, i: int) -> bool:
    """Whether the "orange" at `i`, which is no colour, is surely the fruit."""
    return (i > 0 and caption.lower[i - 1] in DETERMINERS) or _next(caption, i + 1) in ROLES["fruit"]


def _counts(caption: Parsed, i: int, length: int) -> bool:
    """Whether a plural follows within three words, so that another number above one fits as well."""
    if caption.lower[i] in ROLES["digit"] and i and caption.gap(i)[-1:] not in (" ", "("):
        return False
    for k in range(i + length, i + length + 3):
        word = _next(caption, k)
        if word in ROLES["not-counted"] or word in FUNCTION:
            return False
        entry = lexicon().words.get(word)
        if entry.plural if entry else word.endswith("s") and not word.endswith("ss"):
            return True
    return False
