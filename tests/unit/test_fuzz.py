"""10,000 pairs of damaged images and odd captions, in a process of its own: no crash, no silent loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CASES = 10_000


def test_ten_thousand_bad_pairs_are_kept_or_dropped_for_a_reason_and_nothing_else_happens():
    """What must hold of each stands in tests/fuzzing.py. Warnings are all on, and none may appear: not of a
    decoder's code in Python, and not of one in C."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-m", "tests.fuzzing", str(CASES), "1"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["read"] == CASES == report["kept"] + sum(report["dropped"].values())
    assert report["kept"] > CASES / 4  # the cases are not all of one fate
    assert set(report["dropped"]) == {"bad_image", "identical_images", "malformed_row", "no_caption"}
    assert min(report["dropped"].values()) > 20
    assert report["perturbed"] > CASES / 2
