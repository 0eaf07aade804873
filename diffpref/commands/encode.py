"""`diffpref encode`."""

from __future__ import annotations

import argparse

from diffpref.commands.arguments import Overrides, Parser, add_config_file

SUMMARY = "Build the latent and text cache that train would build."


def add_arguments(parser: Parser) -> bool:
    return add_config_file(parser)


def run(values: argparse.Namespace, overrides: Overrides) -> None:
    from diffpref.config import load_train_config

    config = load_train_config(values.config, overrides)
    from diffpref.training.run import encode

    encode(config)
