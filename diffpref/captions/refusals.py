"""Which fields of a request a server does not take, by its answer: each kind of server says it in its way.

OpenAI names the field as the error's `param`; servers that check with pydantic give its place as `loc`;
others write a sentence about it. A field counts as refused where every request with it must fail, not where
only its value does not fit one (a prompt that leaves too little room for `max_tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

_REFUSAL = (
    r"unsupported|unknown|unrecogni[sz]ed|unexpected|forbidden|no such|deprecated|rejects|"
    r"n[o']t (?:be |an? )?(?:support|accept|recogni[sz]e|allow|permit|valid|implement|know|find|used)|"
    r"invalid (?:parameter|param|field|argument|option|key|name)\b"
)
_REFUSES = re.compile(_REFUSAL, re.IGNORECASE)
_FIELD = r"(?:parameter|param|field|argument|option|property|attribute|input|key|name)s?\b"
_SENTENCE = re.compile(r"(?<=[.;!])\s+|\n")


def refused_fields(answer: Any, names: Collection[str]) -> list[str]:
    """Those of the fields `names` that the answer to a request refuses, in their order."""
    found = {name for error in _errors(answer) for name in names if _refuses(error, name)}
    return [name for name in names if name in found]


def _errors(answer: Any) -> Iterator[dict[str, Any]]:
    """Every error in an answer, as an object."""
    found = answer.get("error", answer) if isinstance(answer, dict) else answer
    inner = found.get("detail") or found.get("message") if isinstance(found, dict) else None
    for each in (found, inner):
        for error in each if isinstance(each, list) else [each]:
            if isinstance(error, dict):
                yield error
            elif isinstance(error, str):
                yield {"message": error}


def _refuses(error: dict[str, Any], name: str) -> bool:
    text = " ".join(str(error.get(key) or "") for key in ("code", "type", "message", "msg"))
    place = error.get("loc")
    named = error.get("param") == name or (isinstance(place, list) and place[-1:] == [name])
    if named and _REFUSES.search(text.replace("_", " ")):
        return True
    message = str(error.get("message") or error.get("msg") or "")
    return any(_says(sentence, name) for sentence in _SENTENCE.split(message))


def _says(sentence: str, name: str) -> bool:
    """Whether a sentence refuses a field: it says so, and the name is a field's, no word of a prompt."""
    word = rf"(?<![\w-]){re.escape(name)}(?![\w-])"
    if not re.search(word, sentence) or not _REFUSES.search(sentence.replace("_", " ")):
        return False
    meant = (
        rf"""["'`]{word}["'`]|{_FIELD}[^"'`]{{0,20}}?{word}"""
        rf"|^{word}:|{word}\W{{1,3}}(?:(?:is|are)\W+)?(?:{_REFUSAL})"
    )
    return "_" in name or re.search(meant, sentence, re.IGNORECASE) is not None
