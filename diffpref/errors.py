"""The one exception for mistakes of the user, as opposed to bugs of ours."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from diffpref.texts import one_line, printable

_INDENT = "\n" + 7 * " "
_DEDENTED = re.compile("\n(?! {7})")


class UserError(Exception):
    """A mistake that the user can put right: the command line prints it and exits with code 2.

    `what` says what is wrong, `why` what makes it wrong, `fix` what to do about it. Everything else that is
    raised is a bug and shows its traceback.
    """

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        """What, why and fix. Only `why` may have several lines, which are indented: no name that it holds can
        look like a line of ours."""
        lines = [one_line(self.what)]
        if self.why:
            lines.append(f"  why: {printable(_DEDENTED.sub(_INDENT, self.why))}")
        if self.fix:
            lines.append(f"  fix: {one_line(self.fix)}")
        return "\n".join(lines)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name most like `name`, or "" when none is alike."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return found[0] if found else ""
