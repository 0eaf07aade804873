"""`diffpref caption-report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpref.commands.arguments import Overrides, Parser, positive
from diffpref.errors import UserError

SUMMARY = "Look at dual captions: a sample sheet and statistics in one HTML file."
NAME = "captions-report.html"


def add_arguments(parser: Parser) -> bool:
    from diffpref.config import ColumnsConfig, add_config_arguments

    parser.usage = f"{parser.prog} FOLDER [--out F.html] [--clip MODEL] [--columns.NAME COLUMN ...]"
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="what diffpref caption wrote, or any Parquet file, folder or glob with two captions a pair",
    )
    parser.add_argument(
        "--out",
        metavar="F.html",
        help=f"the report; its numbers go to F.json beside it (default {NAME} in FOLDER)",
    )
    parser.add_argument(
        "--clip", default="", metavar="MODEL", help="CLIP model (folder or hub id) that compares with images"
    )
    parser.add_argument(
        "--clip-pairs", type=positive, metavar="N", help="pairs that CLIP looks at (default 1000)"
    )
    parser.add_argument("--device", metavar="NAME", help="where CLIP runs (default cpu)")
    parser.add_argument(
        "--tokenizer",
        default="",
        metavar="NAME",
        help="folder or hub id of the text encoder's tokenizer, or of its pipeline: counts the tokens of "
        "prompts, and of captions where the files do not tell",
    )
    add_config_arguments(parser, ColumnsConfig, "columns.")
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    from diffpref.captions.report import write_captions_report
    from diffpref.config import ColumnsConfig

    given = {name: getattr(values, name) for name in ("device", "clip_pairs") if getattr(values, name)}
    if given and not values.clip:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{options} without effect: no CLIP model", fix="name one with --clip MODEL")
    out = Path(values.out) if values.out else _default_out(values.folder)
    columns = {
        key.removeprefix("columns."): value
        for key, value in vars(values).items()
        if key.startswith("columns.")
    }
    write_captions_report(
        values.folder,
        out,
        clip=values.clip,
        tokenizer=values.tokenizer,
        columns=ColumnsConfig(**columns),
        **given,
    )
    print(out)


def _default_out(folder: str) -> Path:
    from diffpref.data.schema import find_files

    find_files(folder)  # a folder that does not exist is told as such
    if Path(folder).is_dir():
        return Path(folder) / NAME
    raise UserError(f"{folder} is no folder to put the report in", fix=f"--out {NAME}")
