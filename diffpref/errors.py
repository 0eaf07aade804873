"""The one exception for mistakes of the user, as opposed to bugs of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can put right: the command line prints it and exits with code 2.

    `what` says what is wrong, `why` what makes it wrong, `fix` what to do about it. Everything else that is
    raised is a bug and shows its traceback.
    """

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {label}: {text}" for label, text in (("why", self.why), ("fix", self.fix)) if text]
        return "\n".join(lines)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name most like `name`, or "" when none is alike."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return found[0] if found else ""
