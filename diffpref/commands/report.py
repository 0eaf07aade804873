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
    parser.add_argument("--latex", metavar="F.tex", type=Path, help="write the main table in LaTeX, too")
    parser.add_argument("--markdown", metavar="F.md", type=Path, help="write the tables in Markdown, too")
    parser.add_argument(
        "--image-megabytes",
        metavar="MB",
        type=float,
        default=12.0,
        help="size of embedded images at most (default 12); the best and worst prompts come first",
    )
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    from diffpref.reporting.report import write_report
    from diffpref.reporting.tables import markdown_table

    candidates = [Path(folder) for group in values.candidate for folder in group]
    numbers = write_report(
        Path(values.baseline),
        candidates,
        Path(values.out),
        title=values.title or "",
        force=values.force,
        latex=values.latex,
        markdown=values.markdown,
        image_megabytes=values.image_megabytes,
    )
    written = [str(path) for path in (values.out, values.latex, values.markdown) if path]
    print("\n".join([markdown_table(numbers), "", *written]))
