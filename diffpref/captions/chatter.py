"""What chat models write around a caption: prefaces, labels, remarks, refusals, Markdown; in English."""

from __future__ import annotations

import re
from typing import Literal

_VERB = r"(?:rewritten|revised|modified|perturbed|paraphrased|altered|updated|edited|corrected)"
_KIND = rf"(?:{_VERB}|new|short|brief|changed|image|picture|final|detailed|concise|wrong|alternative)"
_NOUN = (
    r"(?:captions?|descriptions?|prompts?|paraphrases?|versions?|rewrites?|answers?|outputs?|results?|"
    r"responses?|options?|alternatives?|variations?|alt[ -]text)"
)
_YES = r"(?:sure(?: thing)?|certainly|of course|okay|ok|absolutely|alright|got it|understood|no problem)"
_TAIL = r"[\s*_]{0,2}(?:(?:\(|with\b|where\b|in which\b|that\b)[^:.\n]{0,60})?"
_PART = r"(?:details?|elements?|parts?|things?)"
_AROUND = r"[\s*_#>`]{0,4}"

PREFACE = re.compile(
    rf"{_AROUND}(?:{_YES}\b[^\w\n:]{{0,3}}\s*)?"
    rf"(?:here(?:[’']s| is| are)\b[^\n:.]{{0,80}}?\b{_NOUN}\b[^\n:.]{{0,60}}:"
    r"|here (?:you go|it is):"
    rf"|(?:{_KIND} )*{_NOUN}[\s*_]{{0,2}}(?:\([^)\n]{{0,20}}\)[\s*_]{{0,2}})?:"
    rf"|(?:the |my |your |an? )?{_KIND} (?:{_KIND} )*{_NOUN}{_TAIL}"
    r"(?:is|reads|would be|could be|is as follows)?[\s*_]{0,2}:"
    rf"|{_VERB}[\s*_]{{0,2}}:"
    r"|(?:sure|certainly|of course|absolutely)!(?=\s))[*_]*\s*",
    re.IGNORECASE,
)
"""Before a caption in its line."""
_PREFACE_LINE = re.compile(
    rf"{_AROUND}(?:{_YES}\s*[!.,:—-]+\s*(?:(?:here|i|i[’'](?:ll|d|ve)|let me|below|this)\b.{{0,100}})?$"
    rf"|(?:{_YES}\b\W{{1,3}})?here(?:[’']s| is| are)\b.{{0,100}}\b{_NOUN}\b.{{0,60}}$"
    rf"|(?:the |my |your |an? )?(?:{_KIND} )*{_NOUN}\b[^.\n]{{0,60}}:[\s*_]*$"
    r"|i(?:[’'](?:ve|ll)| have| will)\b[^.\n]{0,100}:[\s*_]*$"
    rf"|#{{1,6}} +(?:\d+[.)] )?(?:the )?(?:{_KIND} )*{_NOUN}[\s*_:]*$"
    rf"|\*\*(?:{_KIND} )*{_NOUN}:?\*\*:?$)",
    re.IGNORECASE,
)
_SEVERAL = re.compile(
    rf"\bhere are\b|\b(?:two|three|four|five|several|\d+) (?:\w+ )?{_NOUN}\b|"
    r"\b(?:captions|descriptions|versions|options|alternatives|variations|paraphrases)\b",
    re.IGNORECASE,
)
Label = Literal["old", "new", "any"]


def _label(words: str) -> re.Pattern[str]:
    return re.compile(rf"{_AROUND}(?:the )?{words}{_TAIL}[\s*_]*:[\s*_]*", re.IGNORECASE)


_LABELS: dict[Label, re.Pattern[str]] = {
    "old": _label(rf"(?:original|source|input|given|initial|old|before)\b(?: {_NOUN})?"),
    "new": _label(rf"(?:{_VERB}|{_KIND} (?:{_KIND} )*{_NOUN})"),
    "any": _label(rf"(?:{_KIND} )*(?:{_VERB}|{_NOUN}|new|after)"),
}
_REMARK_START = (
    r"(?:notes?\s*[:—-]|(?:please )?note that\b|explanation\b|rationale\b|reasoning\b"
    r"|(?:key |main )?(?:changes?|modifications?|differences?)\b(?: made)?\W*:"
    r"|(?:the )?(?:only |main )?(?:changes?|differences?|details?) (?:is|are|were|made|changed)\b"
    rf"|(?:the )?(?:altered|changed|modified|wrong|incorrect) {_PART}\b"
    r"|what (?:i |was |has |is )?(?:been )?changed|let me know\b|feel free\b|(?:i )?hope (?:this|that|it)\b"
    r"|(?:would|do) you (?:like|want)\b|if you(?:[’']d| would)? (?:like|want|need|prefer)\b"
    r"|i(?:[’']ve| have)? (?:changed|replaced|rewrote|rewritten|modified|swapped|kept|altered|adjusted)\b"
    r"|(?:in )?this (?:version|rewrite|rewritten|new|revised|description|caption)\b|word count\b"
    r"|(?:original )?prompt[*_]*\s*:)"
)
_REMARK = re.compile(rf"[(\[*_>\s-]*{_REMARK_START}", re.IGNORECASE)
_BRACKETED = re.compile(
    r"[*_]*[(\[].*\b(?:changed|replaced|instead of|swapped|modified|altered|original|description|caption)\b"
    r".*[)\]]\.?[*_]*$",
    re.IGNORECASE,
)
_TALK = re.compile(
    rf"{_AROUND}(?:{_YES}\b|i\b|let(?:[’']s| me| us)\b|here\b|to \w+ (?:the|this|it)\b)", re.IGNORECASE
)
_ASIDE = re.compile(rf"\s*[(\[]\s*{_REMARK_START}[^()\[\]]*[)\]]\.?$", re.IGNORECASE)
_REFUSAL = re.compile(
    r"(?:(?:i[’']?m|i am) (?:\w+ )?)?sorry\b.{0,60}\b(?:can(?:no|[’'])t|unable|not able)\b"
    r"|(?:unfortunately,? )?i (?:can(?:not|[’']t)|am (?:unable|not able)|[’']?m unable|won[’']t)\b.{0,40}\b"
    r"(?:assist|help|provide|describe|create|rewrite|fulfill|comply|generate|identify|see|view|do that)\b"
    r"|as an ai\b",
    re.IGNORECASE,
)
_ITEM = re.compile(
    r"\s*(?:[-*•‣·+–—]\s+|[*_]*(?:\(?(\d{1,2})[.)]"
    r"|(?:option|version|caption|alternative|variation) (\d{1,2})\s*[.):—-])[*_]*\s+)",
    re.IGNORECASE,
)
_RULE = re.compile(r"\s*(?:[-*_=]\s*){3,}$|\s*(?:```|~~~)\w*\s*$")


def refuses(text: str) -> bool:
    """Whether an answer says that the model will not, or cannot, do what it was asked."""
    return _REFUSAL.match(text) is not None


def is_preface(line: str) -> bool:
    """Whether a whole line, with others after it, leads up to a caption."""
    return _PREFACE_LINE.match(line) is not None


def offers_several(line: str) -> bool:
    """Whether a preface announces several captions to choose from."""
    return _SEVERAL.search(line) is not None


def is_remark(line: str) -> bool:
    """Whether a line after a caption begins to talk about it."""
    return _REMARK.match(line) is not None or _BRACKETED.match(line) is not None


def is_talk(line: str) -> bool:
    """Whether a line before a labelled caption speaks of what the model is about to do."""
    return _TALK.match(line) is not None or is_remark(line)


def without_aside(text: str) -> str:
    """The text without a remark in brackets at its end."""
    return _ASIDE.sub("", text) or text


def is_rule(line: str) -> bool:
    """Whether a line is a rule or the edge of a block in Markdown."""
    return _RULE.match(line) is not None


def item(line: str) -> str | None:
    """The text of a list's item, None for another line."""
    found = _ITEM.match(line)
    return line[found.end() :].strip() if found else None


def is_first_item(line: str) -> bool:
    """Whether a line may begin a list: a bullet, or number 1."""
    found = _ITEM.match(line)
    return found is not None and (found[1] or found[2]) in (None, "1")


def after_label(line: str, label: Label) -> str | None:
    """What a line says under the label of a caption, None without it.

    "old": of the caption before. "new": of the one asked for, which the label calls new; "any": or only a
    caption.
    """
    found = _LABELS[label].match(line)
    return line[found.end() :].strip() if found else None
