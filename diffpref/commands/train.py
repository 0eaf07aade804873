"""`diffpref train`."""

from __future__ import annotations

import argparse

from diffpref.commands.arguments import Overrides, Parser, add_config_file

SUMMARY = "Align a model with preference pairs, as a TOML recipe says."


def add_arguments(parser: Parser) -> bool:
    return add_config_file(parser)


def run(values: argparse.Namespace, overrides: Overrides) -> None:
    from diffpref.config import load_train_config

    config = load_train_config(values.config, overrides)
    from diffpref.training.run import train

    train(config)
