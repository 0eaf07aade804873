"""The commands by name: a module each, which imports what it runs when it runs, so that help is quick."""

from __future__ import annotations

import argparse
from typing import Protocol

from diffpref.commands import (
    caption,
    caption_report,
    check,
    convert,
    demo,
    encode,
    env,
    estimate,
    generate,
    report,
    score,
    train,
)
from diffpref.commands.arguments import Overrides, Parser


class Command(Protocol):
    """A module of this package."""

    SUMMARY: str

    def add_arguments(self, parser: Parser) -> bool:
        """Add the options; True when the command takes the keys of a config as well."""
        ...

    def run(self, values: argparse.Namespace, overrides: Overrides) -> int | None:
        """Run it and return the exit code, None for 0."""
        ...


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "train": train,
    "encode": encode,
    "estimate": estimate,
    "generate": generate,
    "score": score,
    "report": report,
    "check": check,
    "convert": convert,
    "caption": caption,
    "caption-report": caption_report,
    "env": env,
}
