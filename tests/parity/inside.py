"""Python in a process that has torchvision, which must stay out of all others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("DIFFPREF_TEST_TORCHVISION", "")
needs_torchvision = pytest.mark.skipif(
    not FOLDER or not (Path(FOLDER) / "torchvision").is_dir(),
    reason="needs torchvision in a folder of its own: "
    "pip install --no-deps --target DIR torchvision, DIFFPREF_TEST_TORCHVISION=DIR",
)


def run_with_torchvision(*arguments: str, importable: bool = True) -> str:
    """Standard output of python with these arguments; asserts that it exits with 0.

    importable: whether torchvision is on the path from the start; the process knows the folder anyhow.
    """
    folder = str(Path(FOLDER).resolve())
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""), folder if importable else ""]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "DIFFPREF_TEST_TORCHVISION": folder}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout
