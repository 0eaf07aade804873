"""Captioners made for tests, in a module of its own so that worker processes can import them, and pairs."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffpref.captions import CAPTIONERS, Captioned, Provenance
from tests.pair_files import image_bytes, row, write

NAMES = {(255, 0, 0): "a red square", (0, 0, 255): "a blue square", (0, 255, 0): "a green square"}
GREEN = image_bytes((0, 255, 0))


@dataclass(frozen=True)
class ColourCaptioner:
    """Names the colour of the first pixel, and counts what it is asked.

    calls: file that gets a line for each call, with its rows. delay: seconds a call takes. refuses: prompt
    whose images it fails on.
    """

    calls: str = field(default="", metadata={"help": "file"})
    delay: float = field(default=0.0, metadata={"help": "seconds"})
    refuses: str = field(default="", metadata={"help": "prompt"})
    seed: int = field(default=0, metadata={"help": "seed"})
    device: str = field(default="cpu", metadata={"help": "device"})

    def __call__(self, images, prompts, rows):
        if self.calls:
            line = f"{os.getpid()} {' '.join(map(str, rows))}\n"
            with open(self.calls, "ab") as stream:
                stream.write(line.encode())
        time.sleep(self.delay)
        return [self._caption(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _caption(self, image, prompt) -> Captioned:
        if prompt == self.refuses:
            return Captioned("", "refused")
        return Captioned(f"{NAMES.get(image.getpixel((0, 0)), 'a square')}, seed {self.seed}")

    def provenance(self) -> Provenance:
        return Provenance("colours", "model-1", "rev", "0123456789abcdef", self.seed)


def asked(calls: Path) -> list[list[int]]:
    """The rows of every call, in the order in which they were made."""
    return [list(map(int, line.split()[1:])) for line in calls.read_text().splitlines()]


def write_pairs(path: Path, count: int, group: int = 7, **changes: Any) -> Path:
    """Red against blue; every 7th row a tie, every 5th (from 3 on) without a label, odd ones lost by red."""
    rows = [
        row(
            label=0.5 if n % 7 == 0 else float(n % 2 == 0),
            has_label=n % 5 != 3,
            caption=f"a big red dog beside {n} old houses",
            number=n,
            **changes,
        )
        for n in range(count)
    ]
    return write(path, rows, group=group)


def main() -> None:
    """`python -m tests.caption_backends ARGS`: diffpref with the captioner above as `colours`."""
    from diffpref.cli import main as diffpref

    CAPTIONERS["colours"] = ColourCaptioner
    sys.exit(diffpref(sys.argv[1:]))


if __name__ == "__main__":
    from tests.caption_backends import main as imported  # so that workers find the classes by this name

    imported()
