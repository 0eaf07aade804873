"""From what a model answers to a caption: what is clearly not part of it is taken off, nothing else.

Where more than one caption could be meant none is taken, and the failure says why.
"""

from __future__ import annotations

import json
import re

from diffpref.captions import chatter
from diffpref.captions.base import Captioned, Perturbed

UNREADABLE = "no caption can be taken from the model's answer"
"""How a failure begins where there is an answer."""
_EMPTY = "the model's answer is empty"
_TAG = r"(?:think(?:ing)?|thoughts?|reasoning|analysis)"
_THOUGHT = re.compile(rf"\s*[<\[]({_TAG})[>\]].*?[<\[]/\1[>\]]", re.DOTALL | re.IGNORECASE)
_THOUGHT_BEGINS = re.compile(rf"\s*[<\[]{_TAG}[>\]]", re.IGNORECASE)
_THOUGHT_ENDS = re.compile(rf"^.*[<\[]/{_TAG}[>\]]", re.DOTALL | re.IGNORECASE)
_TAGGED = re.compile(
    r"<\|begin_of_box\|>(?P<box>[^<]*)<\|end_of_box\|>"
    r"|<(?P<tag>(?:new_|final_)?(?:caption|description|answer|output|response))>(?P<inner>[^<]*)</(?P=tag)>",
    re.IGNORECASE,
)
_BOLD = re.compile(r"\*\*(?=\S)([^*]+)(?<=\S)\*\*")
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»", "`": "`"}
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]")  # no text, or half of a character that was cut
_LONGEST = 16_000
"""Characters of an answer, without its thoughts, in which a caption is looked for."""
_LAYERS = 6
_FULL = 40
"""Signs of a line that may have been broken for its length."""
_SENTENCE_END = re.compile(r"""[.!?…]["”’')\]]*(?=\s|$)""")


def captioned(answer: str, complete: bool = True) -> Captioned:
    """The caption in a captioner's answer, in one line. complete: False for an answer cut at a limit."""
    try:
        text = " ".join(_core(answer, "", complete).split())
    except _NoCaption as problem:
        return Captioned("", str(problem))
    return Captioned(text) if text else Captioned("", _EMPTY)


def perturbed(answer: str, caption: str, complete: bool = True) -> Perturbed:
    """The new caption in a perturber's answer to `caption`. complete: False for an answer cut at a limit."""
    try:
        text = _core(answer, caption.strip(), complete)
    except _NoCaption as problem:
        return Perturbed(caption, False, failure=str(problem))
    if not text:
        return Perturbed(caption, False, failure=_EMPTY)
    return Perturbed(caption, False) if text.split() == caption.split() else Perturbed(text, True)


def cut_short(text: str) -> str:
    """What is whole of a text that was cut off: up to its last sentence end, else to its last whole word."""
    ends = list(_SENTENCE_END.finditer(text))
    if ends:
        return text[: ends[-1].end()]
    words = text.rsplit(None, 1)
    return words[0].rstrip(" ,;:-–—(") if len(words) > 1 else text


class _NoCaption(Exception):
    """There is an answer, but no caption that is surely the one asked for."""

    def __init__(self, why: str, text: str) -> None:
        shown = " / ".join(line for line in map(str.strip, text.splitlines()) if line)
        super().__init__(f"{UNREADABLE}: {why} ({shown if len(shown) <= 120 else f'{shown[:117]}...'})")


def _core(answer: str, source: str, complete: bool) -> str:
    """The caption in an answer; nothing is taken off that `source`, the caption before, has itself."""
    text = _without_thoughts(_CONTROL.sub("", answer), source)
    if len(text) > _LONGEST:
        raise _NoCaption(f"it has {len(text)} characters", text[:200])
    text = text if complete else cut_short(text)
    if chatter.refuses(text) and not chatter.refuses(source):
        raise _NoCaption("it refuses", text)
    text = _unpacked(text, source)
    return _of_paragraphs(text, source) if "\n" in source else _of_lines(text, source)


def _without_thoughts(text: str, source: str) -> str:
    """What follows the model's thoughts; "" where it was cut off before it began to answer."""
    if _THOUGHT_BEGINS.match(source) or _THOUGHT_ENDS.match(source):
        return text.strip()
    end = 0
    while found := _THOUGHT.match(text, end):
        end = found.end()
    # some servers keep the tag that begins them
    text = _THOUGHT_ENDS.sub("", text[end:], count=1).strip()
    return "" if _THOUGHT_BEGINS.match(text) else text


def _unpacked(text: str, source: str) -> str:
    """What the answer holds between tags or as JSON."""
    tagged = list(_TAGGED.finditer(text))
    if len(tagged) == 1 and not _TAGGED.search(source):
        text = (tagged[0]["box"] or tagged[0]["inner"] or "").strip()
    bare = "\n".join(line for line in text.splitlines() if not chatter.is_rule(line)).strip()
    if not bare.startswith("{") or source.startswith("{"):
        return text
    try:
        found = json.loads(bare)
    except (ValueError, RecursionError):
        return text
    values = [
        value for key, value in found.items() if chatter.after_label(f"{key}:".replace("_", " "), "any") == ""
    ]
    if len(values) != 1 or not isinstance(values[0], str):
        raise _NoCaption("it is JSON without one caption", text)
    return values[0].strip()


def _of_paragraphs(text: str, source: str) -> str:
    """The caption, which may have several lines as `source` has."""
    preface = chatter.PREFACE.match(text)
    if preface and not chatter.PREFACE.match(source):
        text = text[preface.end() :]
    first, *others = _paragraphs(text)
    while others and chatter.is_remark(others[-1]) and not chatter.is_remark(_paragraphs(source)[-1]):
        others.pop()
    return _unquote("\n\n".join([first, *others]).strip(), source)


def _of_lines(text: str, source: str) -> str:
    """The caption of an answer to a `source` of one line, or of none."""
    found = [line.strip() for line in text.splitlines() if not chatter.is_rule(line)]
    blanks = [not line for line in found]
    lines = [line for line in found if line]
    apart = {sum(not blank for blank in blanks[:i]) for i, blank in enumerate(blanks) if blank}
    lines = _without_remarks(lines, apart)
    several = False
    while len(lines) > 1 and chatter.is_preface(lines[0]) and not chatter.PREFACE.match(source):
        several = chatter.offers_several(lines.pop(0)) or several
    lines = _labelled(_without_echo(lines, source))
    if len({_plain(line) for line in lines}) > 1:
        lines = [_joined(lines, source, several, text)]
    return _clean(lines[0], source) if lines else ""


def _without_remarks(lines: list[str], apart: set[int]) -> list[str]:
    """The lines before the remarks that end an answer. apart: lines that follow a blank one."""
    for start in range(1, len(lines)):
        rest = range(start, len(lines))
        if chatter.is_remark(lines[start]) and all(
            chatter.is_remark(lines[i]) or chatter.item(lines[i]) is not None or i not in apart for i in rest
        ):
            return lines[:start]
    return lines


def _labelled(lines: list[str]) -> list[str]:
    """The lines under the label of the new caption, where one is called so and nothing before it may be the
    caption as well; else all."""
    starts = [i for i, line in enumerate(lines) if chatter.after_label(line, "old") is not None]
    label: chatter.Label = "any" if starts else "new"
    new = [
        i for i, line in enumerate(lines) if i not in starts and chatter.after_label(line, label) is not None
    ]
    first = min([*starts, *new], default=0)
    if len(new) != 1 or len(lines) == 1 or not all(map(chatter.is_talk, lines[:first])):
        return lines
    end = next((i for i in starts if i > new[0]), len(lines))
    found = [chatter.after_label(lines[new[0]], label) or "", *lines[new[0] + 1 : end]]
    return [line for line in found if line]


def _without_echo(lines: list[str], source: str) -> list[str]:
    """The lines without those that repeat the caption before, under a label or not."""
    echo = _plain(source)

    def repeats(line: str) -> bool:
        return echo in (_plain(line), _plain(chatter.after_label(line, "any") or ""))

    others = [line for line in lines if not repeats(line)]
    return others if echo and others else lines


def _plain(text: str) -> str:
    """A text without what does not tell it from another in writing."""
    return "".join(sign for sign in text.casefold() if sign.isalnum())


def _joined(lines: list[str], source: str, several: bool, text: str) -> str:
    """Several lines as one caption; the first of a list that offers several. Raises _NoCaption."""
    items = [chatter.item(line) for line in lines]
    if any(item is not None for item in items[1:]):
        first = items[0]
        if several and first and None not in items:
            return first
        raise _NoCaption("it has several lines, a list", text)
    joined = " ".join(lines)
    if several:
        raise _NoCaption("it offers several", text)
    if source and not _is_one(lines, joined, source):
        raise _NoCaption("it has several lines, the caption one", text)
    return joined


def _is_one(lines: list[str], joined: str, source: str) -> bool:
    """Whether lines are surely one caption: no longer than `source` by half, and broken at sentences of which
    there are no more than in `source`, or where a line was full."""
    if len(joined) > 1.5 * len(source) + 20:
        return False
    whole = [_SENTENCE_END.search(line[-4:]) is not None for line in lines[:-1]]
    if all(whole):
        return len(_SENTENCE_END.findall(joined)) <= max(1, len(_SENTENCE_END.findall(source)))
    following = zip(lines, lines[1:], whole, strict=False)
    return all(len(line) >= _FULL and not ends and after[0].islower() for line, after, ends in following)


def _clean(text: str, source: str) -> str:
    """A caption without marks of Markdown, label, quotes and remark in brackets, one within the other."""
    for _ in range(_LAYERS):
        if chatter.is_first_item(text) and chatter.item(source) is None:
            text = chatter.item(text) or ""
        if "**" not in source:
            text = _BOLD.sub(r"\1", text)
        for mark in ("*", "_", "`", "> ", "# "):
            text = _unmarked(text, mark, source)
        preface = chatter.PREFACE.match(text)
        if preface and not chatter.PREFACE.match(source):
            text = text[preface.end() :]
        if chatter.without_aside(source) == source:
            text = chatter.without_aside(text)
        text = _unquote(text.strip(), source)
    return "" if len(text.split()) <= 3 and chatter.is_preface(text) else text


def _unmarked(text: str, mark: str, source: str) -> str:
    """The text without a mark around it, or before it where the mark ends with a space."""
    if source.startswith(mark.strip()):
        return text
    if mark.endswith(" "):
        return text.removeprefix(mark)
    around = (
        len(text) > 2 and text[0] == text[-1] == mark and mark not in text[1:-1] and not text[1].isspace()
    )
    return text[1:-1] if around else text


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text.strip())


def _unquote(text: str, source: str) -> str:
    """The text without the quotes around all of it; they stay where they are within it or around `source`."""
    for left, right in _QUOTES.items():
        inner = text[1:-1]
        around = len(text) > 2 and text[0] == left and text[-1] == right
        if around and left not in inner and right not in inner and source[:1] != left:
            return inner.strip()
    return text
