"""`diffpref demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpref.commands.arguments import Overrides, Parser

SUMMARY = "Align the shipped small model with several objectives and write a report."


def add_arguments(parser: Parser) -> bool:
    parser.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="folder for everything (default runs/demo)"
    )
    parser.add_argument(
        "--objective",
        action="append",
        default=[],
        metavar="NAME",
        help="only this one: sft, dpo, mapo or dcpo; repeatable",
    )
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    from diffpref.demo import run_demo

    run_demo(Path(values.out), values.objective)
