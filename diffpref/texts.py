"""Texts that others wrote: which say nothing, which are too long, and how they are shown in a terminal."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any, TextIO, cast

LONGEST = 2**20
"""Characters of a caption or prompt; no model reads a thousandth of them."""

# Letters and marks that show nothing: joiners and fillers of scripts, variation selectors, blank Braille.
_UNSEEN = "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u2800\u3164\ufe00-\ufe0f\uffa0"
_NOTHING = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))
_UNSEEN_MARK = re.compile(f"[{_UNSEEN}\U000e0100-\U000e01ef]")
VISIBLE = (
    r"[^\p{Cc}\p{Cf}\p{Z}"
    + "".join(f"\\x{{{ord(c):x}}}" if c != "-" else c for c in _UNSEEN + "\U000e0100-\U000e01ef")
    + "]"
)
"""A character that shows something, as a regular expression of RE2 (Arrow's)."""

# Control characters but tab and line end, half surrogate pairs, and what turns or hides the text beside it.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0001-\U000e007f]"
)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, control and format characters (zero-width ones) alone.

    >>> is_blank(" \\u200b\\ufeff"), is_blank("a")
    (True, False)
    """
    return all(unicodedata.category(c) in _NOTHING or _UNSEEN_MARK.match(c) for c in text)


def printable(text: str) -> str:
    """The text with its control characters, bidirectional overrides and half surrogates as escapes.

    Line ends and tabs stay, and so do the joiners that emoji and Indic scripts need.

    >>> print(printable("a\\x1b[31mb\\u202ec"))
    a\\x1b[31mb\\u202ec
    """
    return _UNPRINTABLE.sub(_escaped, text)


def shorten(value: Any) -> str:
    """A value as messages show it: its first 60 characters."""
    text = " ".join(repr(value[:100] if isinstance(value, (str, bytes, list)) else value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(text: str) -> str:
    """`printable`, with line ends as escapes too: a name cannot begin a line of its own."""
    return printable(text).replace("\n", "\\n")


def _escaped(match: re.Match[str]) -> str:
    return {"\r": "\\r"}.get(match[0]) or match[0].encode("unicode_escape", "surrogatepass").decode()


def printable_stream(stream: TextIO) -> TextIO:
    """The stream, which shows every text `printable`: the one place where names of files, columns and models
    meet the terminal, from whatever library they come."""
    return cast(TextIO, _PrintableStream(stream))


class _PrintableStream:
    """The first "\\r" of a text, and texts of cursor movements alone, pass: progress bars write those."""

    _MOVES = re.compile(r"(?:\n|\r|\x1b\[A)*")

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if self._MOVES.fullmatch(text):
            self._stream.write(text)
        else:
            first = text[:1] if text[:1] == "\r" else ""
            self._stream.write(first + printable(text[len(first) :]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_MARKUP = str.maketrans(
    {"<": "&lt;", ">": "&gt;", "|": "\\|", "`": "\\`", "[": "\\[", "]": "\\]", "\\": "\\\\"}
)


def markdown(text: str) -> str:
    """Plain text in a line of Markdown or a cell of its tables: no line ends, HTML, links or code in it."""
    return one_line(text).translate(_MARKUP)


def code(text: str) -> str:
    """Plain text as a code span of Markdown, whatever marks are in it."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{one_line(text)}{space}{fence}"
