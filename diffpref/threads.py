"""CPU threads of torch's operators: how they wait for each other, and how many there are."""

from __future__ import annotations

import os

SPIN_COUNT = "GOMP_SPINCOUNT"
SPINS = "1000"
"""Turns of a waiting thread's loop before it sleeps. libgomp's own 300000 hold a core that another process
needs; chosen by measurement, `bench/waiting.py`."""

_DECIDES = (SPIN_COUNT, "OMP_WAIT_POLICY")
_chosen_here = False


def shorten_waits() -> None:
    """Let waiting threads sleep early, unless the environment says how they wait. Before torch loads."""
    global _chosen_here
    if not any(name in os.environ for name in _DECIDES):
        os.environ[SPIN_COUNT] = SPINS
        _chosen_here = True


def described(variable: str) -> str:
    """The value of an environment variable as `diffpref env` shows it."""
    value = os.environ.get(variable, "(unset)")
    return f"{value} (diffpref's choice)" if _chosen_here and variable == SPIN_COUNT else value


def at_most(wanted: int) -> int:
    """`wanted` threads, or as many as OMP_NUM_THREADS allows when those are fewer; wanted: at least 1.

    A config says what suits the model, the environment what this machine has to give: with OMP_NUM_THREADS
    = 2, `at_most(1)` is 1 and `at_most(8)` is 2.
    """
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # of a list by nesting level
    allowed = outermost.strip()
    return min(wanted, int(allowed)) if allowed.isdecimal() and int(allowed) else wanted
