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


def add_evaluators(parser: Parser, required: bool = True) -> None:
    """--evaluators, and what their networks run with."""
    parser.add_argument(
        "--evaluators", required=required, default="", metavar="A,B", help="names, separated by commas"
    )
    parser.add_argument(
        "--weights",
        type=pair,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="folder, file or hub id of an evaluator's weights (default: the published ones)",
    )
    parser.add_argument(
        "--batch", type=positive, default=32, metavar="N", help="images judged together (default 32)"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: the best there is)"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="precision of the evaluators' networks, recorded with the scores (default fp32)",
    )


def evaluator_names(text: str) -> list[str]:
    """Raises UserError when there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("--evaluators names none", fix="such as --evaluators oracle")
    return names
