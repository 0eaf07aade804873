"""`diffpref score`."""

from __future__ import annotations

import argparse

from diffpref.commands.arguments import Overrides, Parser, add_evaluators, evaluator_names, pair

SUMMARY = "Judge generated images."

NOTES = """
PLACE is a folder that diffpref generate wrote; a folder of images with metadata.jsonl, metadata.csv or
a .txt beside each image; a Parquet file or a folder of them; a .csv, .tsv or .jsonl file. A warning names
every file of a folder that is not scored. Several
evaluators share one pass over the images. A stopped command goes on where it was, and under accelerate
launch or torchrun the processes share the images; the scores are the same, bit for bit.
"""


def add_arguments(parser: Parser) -> bool:
    parser.description = f"{parser.description}\n{NOTES}"
    parser.add_argument("place", metavar="PLACE", help="images and prompts")
    add_evaluators(parser)
    parser.add_argument(
        "--columns",
        type=pair,
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=NAME",
        help="names of the columns, such as image=jpg_0 prompt=caption; keys: image, prompt, id, prompt_id, "
        "kind, seed",
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="keep images that are missing or damaged as rows without scores, with the reason, instead of "
        "failing when all others are scored",
    )
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    from diffpref.processes import launched
    from diffpref.scoring import runtime_of, score

    with launched() as processes:
        written = score(
            values.place,
            evaluator_names(values.evaluators),
            batch=values.batch,
            runtime=runtime_of(values.device, values.dtype, processes),
            weights=dict(values.weights),
            columns=dict(values.columns),
            allow_missing=values.allow_missing,
            processes=processes,
        )
        if processes.main:
            print(written)
