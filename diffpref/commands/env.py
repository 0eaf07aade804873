"""`diffpref env`."""

from __future__ import annotations

import argparse

from diffpref.commands.arguments import Overrides, Parser

SUMMARY = "Print versions, devices, threads and optional packages."


def add_arguments(parser: Parser) -> bool:
    del parser
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    del values
    from diffpref.environment import describe

    print(describe())
