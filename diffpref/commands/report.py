"""`diffpref report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpref.commands.arguments import Overrides, Parser

SUMMARY = "Compare scored folders in one HTML file."


def add_arguments(parser: Parser) -> bool:
    parser.add_argument("--baseline", required=True, metavar="DIR", help="scored folder to compare with")
    parser.add_argument(
        "--candidate",
        required=True,
        action="append",
        nargs="+",
        metavar="DIR",
        help="scored folders to compare; repeatable",
    )
    parser.add_argument(
        "--out", required=True, metavar="F.html", help="the report; its numbers go to F.json beside it"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="compare folders whose sampling settings, prompts or seeds differ; the report lists how",
    )
    parser.add_argument("--title", metavar="TEXT", help="title of the report")
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    from diffpref.reporting.report import write_report
    from diffpref.reporting.tables import markdown_table

    candidates = [Path(folder) for group in values.candidate for folder in group]
    title = {"title": values.title} if values.title else {}
    numbers = write_report(Path(values.baseline), candidates, Path(values.out), force=values.force, **title)
    print(f"{markdown_table(numbers)}\n\n{values.out}")
