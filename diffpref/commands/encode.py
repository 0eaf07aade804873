"""`diffpref encode`."""

from __future__ import annotations

import argparse

from diffpref.commands.arguments import Overrides, Parser, add_config_file, count, shard

SUMMARY = "Build the latent and text cache that train would build."


def add_arguments(parser: Parser) -> bool:
    takes_keys = add_config_file(parser)
    parser.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="make every N-th file only, from file I on"
    )
    parser.add_argument(
        "--workers",
        type=count,
        default=0,
        metavar="N",
        help="processes that encode, each its own GPU (default 0: one for each GPU, or this one)",
    )
    parser.add_argument(
        "--engine",
        default="local",
        metavar="NAME",
        help="local, or ray: actors on the cluster of RAY_ADDRESS or on this machine (default local)",
    )
    return takes_keys


def run(values: argparse.Namespace, overrides: Overrides) -> None:
    from diffpref.config import load_train_config
    from diffpref.training.encode import EncodeOptions, encode

    config = load_train_config(values.config, overrides)
    encode(config, EncodeOptions(values.shard, values.engine, values.workers))
