"""`diffpref check`."""

from __future__ import annotations

import argparse

from diffpref.commands.arguments import Overrides, Parser

SUMMARY = "Look through preference pairs and say whether they can be trained on."


def add_arguments(parser: Parser) -> bool:
    from diffpref.config import ColumnsConfig, add_config_arguments

    parser.usage = f"{parser.prog} PAIRS [--captions shared|dual] [--columns.NAME COLUMN ...]"
    parser.add_argument(
        "pairs", metavar="PAIRS", help="Parquet file, folder of them, glob, or tiny:pairs/train.parquet"
    )
    parser.add_argument(
        "--captions",
        choices=("shared", "dual"),
        default="shared",
        help="whether each image needs its own caption (default shared)",
    )
    add_config_arguments(parser, ColumnsConfig, "columns.")
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    from diffpref.config import ColumnsConfig
    from diffpref.data.check import check

    columns = {
        key.removeprefix("columns."): value
        for key, value in vars(values).items()
        if key.startswith("columns.")
    }
    check(values.pairs, captions=values.captions, columns=ColumnsConfig(**columns))
