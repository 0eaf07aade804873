"""`diffpref encode`."""

from __future__ import annotations

import argparse

from diffpref.commands.arguments import Overrides, Parser, add_config_file, engine, shard

SUMMARY = "Build the latent and text cache that train would build."


def add_arguments(parser: Parser) -> bool:
    takes_keys = add_config_file(parser)
    parser.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="make every N-th file only, from file I on"
    )
    engine(parser, "one for each GPU, or this process")
    return takes_keys


def run(values: argparse.Namespace, overrides: Overrides) -> None:
    from diffpref.config import load_train_config
    from diffpref.training.encode import EncodeOptions, encode

    config = load_train_config(values.config, overrides)
    encode(config, EncodeOptions(values.shard, values.engine, values.workers))
