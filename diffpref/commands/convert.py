"""`diffpref convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpref.commands.arguments import Overrides, Parser, add_parts, engine, pair

SUMMARY = "Turn preference pairs of other formats into Parquet that train reads."


def add_arguments(parser: Parser) -> bool:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="Parquet file, folder of them, glob or hub id; .json, .jsonl, .csv, .tsv; folder with w/ and l/",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the Parquet parts; continued when begun"
    )
    parser.add_argument(
        "--format",
        default="auto",
        metavar="NAME",
        help="pick-a-pic, pick-double-caption, hpdv2, hpdv3, jsonl, csv or folders (default auto)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="ROOT",
        help="folder that image paths start at and may not leave (default: that of SOURCE)",
    )
    parser.add_argument(
        "--columns",
        type=pair,
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=NAME",
        help="names of the columns, such as caption=prompt image_0=left image_1=right label_0=won",
    )
    add_parts(parser, "SOURCE")
    parser.add_argument("--keep-ties", action="store_true", help="keep pairs without a preference, label 0.5")
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=1.0,
        metavar="X",
        help="fail when more than this share of the rows is bad (0 to 1; default 1: report them only)",
    )
    engine(parser, "this process")
    parser.add_argument("--split", default="", metavar="NAME", help="split of a hub id (default train)")
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    from diffpref.data.convert import ConvertOptions, convert

    options = {name: value for name, value in vars(values).items() if name not in ("source", "out")}
    convert(values.source, Path(values.out), ConvertOptions(**{**options, "columns": dict(values.columns)}))
