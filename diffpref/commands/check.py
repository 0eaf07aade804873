"""`diffpref check`."""

from __future__ import annotations

import argparse

from diffpref.commands.arguments import Overrides, Parser
from diffpref.errors import UserError

SUMMARY = "Look through preference pairs, or a cache of them, and say whether they can be trained on."


def add_arguments(parser: Parser) -> bool:
    from diffpref.config import ColumnsConfig, add_config_arguments

    parser.usage = f"{parser.prog} PAIRS [--captions shared|dual] [--columns.NAME COLUMN ...] | CACHE"
    parser.add_argument(
        "pairs",
        metavar="PAIRS",
        help="Parquet file, folder of them, glob, or tiny:pairs/train.parquet; or the folder of a cache, "
        "whose files are all compared with their SHA-256",
    )
    parser.add_argument(
        "--captions",
        choices=("shared", "dual"),
        help="whether each image needs its own caption (default shared)",
    )
    add_config_arguments(parser, ColumnsConfig, "columns.")
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    from diffpref.config import ColumnsConfig
    from diffpref.data.check import check, is_cache
    from diffpref.paths import resolve

    columns = {
        key.removeprefix("columns."): value
        for key, value in vars(values).items()
        if key.startswith("columns.")
    }
    place = resolve(values.pairs)
    if not isinstance(place, str) and is_cache(place):
        from diffpref.data.cache_check import check_cache

        if columns or values.captions:
            raise UserError(
                f"--captions and --columns have no effect: {place} is a cache", fix="leave them out"
            )
        check_cache(place)
        return
    check(values.pairs, captions=values.captions or "shared", columns=ColumnsConfig(**columns))
