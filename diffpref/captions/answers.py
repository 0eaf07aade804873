"""From what a model answers to a caption: what is clearly not part of it is taken off, nothing else."""

from __future__ import annotations

import re

from diffpref.captions.base import Captioned, Perturbed

_THOUGHT = re.compile(r"^\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_ADJECTIVE = r"(?:new|short|brief|revised|rewritten|modified|changed|perturbed|paraphrased|image|picture)"
_NOUN = r"(?:captions?|descriptions?|prompts?|paraphrases?|versions?|rewrites?|answers?|outputs?|results?)"
_PREFACE = re.compile(
    r"(?:(?:sure|certainly|of course|okay|ok|absolutely)\b[^\w\n:]{0,3}\s*)?"
    r"(?:here(?:[’']s| is| are)\b[^\n:.]{0,80}?\b" + _NOUN + r"\b[^\n:.]{0,60}:"
    r"|here (?:you go|it is):"
    r"|\W{0,2}(?:" + _ADJECTIVE + " )*" + _NOUN + r"\W{0,2}:)[*_]*\s*",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"[(\[*_]*(?:note\b|explanation\b|changes?\b(?: made)?\W*:|let me know\b"
    r"|i(?:[’']ve| have)? (?:changed|replaced|rewrote|rewritten|modified|swapped|kept)\b"
    r"|(?:in )?this (?:version|rewrite|rewritten|new|revised)\b)",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»", "`": "`"}
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]")  # no text, or half of a character that was cut
_SENTENCE_END = re.compile(r"""[.!?…]["”’')\]]*(?=\s|$)""")


def captioned(answer: str, complete: bool = True) -> Captioned:
    """The caption in a captioner's answer, in one line. complete: False for an answer cut at a limit."""
    text = " ".join(_core(answer, "", complete).split())
    return Captioned(text) if text else Captioned("", "the model's answer is empty")


def perturbed(answer: str, caption: str, complete: bool = True) -> Perturbed:
    """The new caption in a perturber's answer to `caption`. complete: False for an answer cut at a limit."""
    text = _core(answer, caption, complete)
    if not text:
        return Perturbed(caption, False, failure="the model's answer is empty")
    if "\n" in text and "\n" not in caption.strip():
        return Perturbed(caption, False, failure="the model's answer has several lines, the caption one")
    return Perturbed(caption, False) if text.split() == caption.split() else Perturbed(text, True)


def cut_short(text: str) -> str:
    """What is whole of a text that was cut off: up to its last sentence end, else to its last whole word."""
    ends = list(_SENTENCE_END.finditer(text))
    if ends:
        return text[: ends[-1].end()]
    words = text.rsplit(None, 1)
    return words[0].rstrip(" ,;:-–—(") if len(words) > 1 else text


def _core(answer: str, source: str, complete: bool) -> str:
    """The answer without thoughts, preface, remarks and quotes, as far as `source` has none itself."""
    text = _THOUGHT.sub("", _CONTROL.sub("", answer), count=1).strip()
    if text.lower().startswith("<think"):  # cut off before it began to answer
        return ""
    text = text if complete else cut_short(text)
    preface = _PREFACE.match(text)
    if preface and not _PREFACE.match(source):
        text = text[preface.end() :]
    first, *others = _paragraphs(text)
    while others and _REMARK.match(others[-1]) and not _REMARK.match(_paragraphs(source)[-1]):
        others.pop()
    return _unquote("\n\n".join([first, *others]).strip(), source.strip())


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
