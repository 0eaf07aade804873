"""`diffpref score`."""

from __future__ import annotations

import argparse

from diffpref.commands.arguments import Overrides, Parser, positive
from diffpref.errors import UserError

SUMMARY = "Judge generated images."


def add_arguments(parser: Parser) -> bool:
    parser.add_argument(
        "folder", metavar="DIR", help="folder that diffpref generate wrote, or a table of images and prompts"
    )
    parser.add_argument(
        "--evaluators", required=True, metavar="A,B", help="names, separated by commas, such as oracle"
    )
    parser.add_argument(
        "--batch", type=positive, default=32, metavar="N", help="images judged together (default 32)"
    )
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    from diffpref.scoring import score

    names = [name.strip() for name in values.evaluators.split(",") if name.strip()]
    if not names:
        raise UserError("--evaluators names none", fix="such as --evaluators oracle")
    print(score(values.folder, names, values.batch))
