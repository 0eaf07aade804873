"""How a benchmark script ends."""

from __future__ import annotations

import sys
from collections.abc import Callable

from diffpref.errors import UserError


def printed(work: Callable[[], object]) -> int:
    """Print what `work` returns; the exit code. A UserError is told as the command line does."""
    try:
        print(work())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
