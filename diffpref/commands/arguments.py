"""What the commands share: the parser, the types of arguments, a config with its keys."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any, NoReturn

from diffpref.errors import UserError

Overrides = list[tuple[str, str]]
"""Keys given as `--a.b VALUE`, with their texts, in order."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors look like all others here and name the nearest option."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix=f"see {self.prog} --help")


def add_config_file(parser: Parser) -> bool:
    """CONFIG and every key of it; True, since the command takes keys."""
    from diffpref.config import add_config_arguments

    parser.usage = f"{parser.prog} CONFIG [--section.key VALUE ...]"
    parser.add_argument("config", metavar="CONFIG", help="TOML file, or the name of a shipped recipe")
    add_config_arguments(parser)
    parser.description = textwrap.dedent(f"""\
        {parser.description}

        Every setting stands in the TOML file under its section, or on the command line as --section.key VALUE
        (or --section.key=VALUE), which wins. Lists are written as TOML: '["a", "b"]'.""")
    return True


def add_version(parser: Parser, of: str) -> None:
    """--revision and --variant, as `model.revision` and `model.variant` of a config."""
    parser.add_argument(
        "--revision", default="", metavar="REV", help=f"branch, tag or commit {of}, of hub ids"
    )
    parser.add_argument(
        "--variant",
        default="",
        metavar="NAME",
        help=f"weight file variant {of}, such as fp16, for the parts that have it",
    )


def count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def positive(text: str) -> int:
    if count(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def pair(text: str) -> tuple[str, str]:
    key, _, name = text.partition("=")
    if not key or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=NAME")
    return key, name


def shard(text: str) -> tuple[int, int]:
    index, _, total = text.partition("/")
    return count(index), positive(total)


def add_evaluators(parser: Parser) -> None:
    """--evaluators, and what their networks run with."""
    parser.add_argument(
        "--evaluators", required=True, metavar="A,B", help="names, separated by commas, such as oracle"
    )
    add_evaluator_runtime(parser)


def add_evaluator_runtime(parser: Parser) -> None:
    """What the networks of evaluators run with."""
    parser.add_argument(
        "--weights",
        type=pair,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="folder, file or hub id of an evaluator's weights (default: the published ones)",
    )
    parser.add_argument(
        "--batch", type=positive, default=32, metavar="N", help="images judged together (default 32)"
    )
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="precision of the evaluators' networks, recorded with the scores (default fp32)",
    )


def evaluator_names(text: str) -> list[str]:
    """Raises UserError when there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("--evaluators names none", fix="such as --evaluators oracle")
    return names


def add_suite(parser: Parser) -> None:
    """--suite, and sampler settings that win over its own."""
    parser.add_argument(
        "--suite",
        required=True,
        metavar="SUITE",
        help="shipped suite's name, TOML file, or prompts: .txt, .csv, .tsv, .jsonl, .json, .parquet, or "
        "FORMAT:PLACE, where PLACE may be a hub id and FORMAT is parti, drawbench, geneval, hpdv2, "
        "pick-a-pic or prompts",
    )
    parser.add_argument(
        "--scheduler", metavar="NAME", help="ddim, euler, dpmsolver++ or pndm, not the suite's"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="denoising steps, not the suite's")
    parser.add_argument("--guidance", type=float, metavar="G", help="guidance scale, not the suite's")
    parser.add_argument(
        "--size", type=size, metavar="WxH", help="pixels, such as 512 or 1024x768, not the suite's"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="negative prompt, not the suite's")
    parser.add_argument(
        "--seeds", type=seeds, metavar="S,S", help="seeds, an image of each prompt for each, not the suite's"
    )
    parser.add_argument(
        "--limit",
        type=count,
        default=0,
        metavar="N",
        help="only N prompts, kinds by their shares (default 0: all)",
    )


def sampling(values: argparse.Namespace) -> dict[str, Any]:
    """The settings given, by their key in a suite."""
    names = ("scheduler", "steps", "guidance", "negative_prompt", "seeds")
    given = {name: getattr(values, name) for name in names if getattr(values, name) is not None}
    if values.size is not None:
        given["width"], given["height"] = values.size
    return given


def timesteps(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return count(low), count(high or low)


def size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return positive(width), positive(height or width)


def seeds(text: str) -> list[int]:
    return [count(seed) for seed in text.split(",")]


def add_device(parser: Parser) -> None:
    """--device, of whatever network the command runs."""
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: the best there is)"
    )


def add_parts(parser: argparse._ActionsContainer, rows: str) -> None:
    """--rows-per-file and --shard. rows: whose rows the parts cover."""
    parser.add_argument(
        "--rows-per-file",
        type=positive,
        default=1000,
        metavar="N",
        help=f"rows of {rows} that one part covers (default 1000)",
    )
    parser.add_argument(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="I/N",
        help="make every N-th part only, from part I on (I from 0)",
    )


def engine(parser: argparse._ActionsContainer, workers: str) -> None:
    """--engine and --workers. workers: what 0 stands for in the local engine."""
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="processes of this machine, or Ray actors here or on the cluster of RAY_ADDRESS (default local)",
    )
    parser.add_argument(
        "--workers",
        type=count,
        default=0,
        metavar="N",
        help=f"processes, or Ray actors (default 0: {workers}; with Ray one for each GPU or CPU)",
    )
