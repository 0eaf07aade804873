"""What the commands share: the parser, the types of arguments, a config with its keys."""

from __future__ import annotations

import argparse
import textwrap
from typing import NoReturn

from diffpref.errors import UserError

Overrides = list[tuple[str, str]]
"""Keys given as `--a.b VALUE`, with their texts, in order."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors look like all others here and name the nearest option."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix=f"see {self.prog} --help")


def add_config_file(parser: Parser) -> bool:
    """CONFIG and every key of it; True, since the command takes keys."""
    from diffpref.config import add_config_arguments

    parser.usage = f"{parser.prog} CONFIG [--section.key VALUE ...]"
    parser.add_argument("config", metavar="CONFIG", help="TOML file, or the name of a shipped recipe")
    add_config_arguments(parser)
    parser.description = textwrap.dedent(f"""\
        {parser.description}

        Every setting stands in the TOML file under its section, or on the command line as --section.key VALUE
        (or --section.key=VALUE), which wins. Lists are written as TOML: '["a", "b"]'.""")
    return True


def count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def positive(text: str) -> int:
    if count(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def pair(text: str) -> tuple[str, str]:
    key, _, name = text.partition("=")
    if not key or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=NAME")
    return key, name


def shard(text: str) -> tuple[int, int]:
    index, _, total = text.partition("/")
    return count(index), positive(total)


def engine(parser: argparse._ActionsContainer, workers: str) -> None:
    """--engine and --workers. workers: what 0 stands for in the local engine."""
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="processes of this machine, or Ray actors here or on the cluster of RAY_ADDRESS (default local)",
    )
    parser.add_argument(
        "--workers",
        type=count,
        default=0,
        metavar="N",
        help=f"processes, or Ray actors (default 0: {workers}; with Ray one for each GPU or CPU)",
    )
