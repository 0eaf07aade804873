"""`diffpref caption`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffpref.commands.arguments import Overrides, Parser, add_parts, count, engine, positive
from diffpref.errors import UserError

SUMMARY = "Give each image of a pair a caption of its own, for training with dual captions."

NOTES = """
The methods are those of DCPO (arXiv 2502.06023):
  captioning    a captioner describes both images, given the prompt as context
  perturbation  the winner keeps the prompt, the loser gets a perturbed version of it
  hybrid        a captioner describes both images, then the loser's caption is perturbed

  diffpref caption --pairs tiny:pairs/train.parquet --replace --method hybrid --captioner oracle \\
      --perturber rules --perturber.level strong --out runs/hybrid
  diffpref check runs/hybrid --captions dual

OUT gets Parquet parts with all columns of the pairs, caption_0 and caption_1, their lengths in tokens, and
where they come from. The same command continues what was interrupted.
"""


def add_arguments(parser: Parser) -> bool:
    from diffpref.captions import CAPTIONERS, PERTURBERS
    from diffpref.captions.stages import METHODS
    from diffpref.config import ColumnsConfig, add_config_arguments

    parser.usage = (
        f"{parser.prog} --pairs PAIRS --method METHOD [--captioner NAME --captioner.KEY VALUE ...] [...]"
    )
    parser.description = f"{parser.description}\n{NOTES}"
    parser.add_argument(
        "--pairs", required=True, metavar="PAIRS", help="Parquet file, folder of them, glob, or tiny:FILE"
    )
    parser.add_argument("--method", required=True, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--captioner", metavar="NAME", help=f"{', '.join(CAPTIONERS)}; see below")
    parser.add_argument(
        "--perturber", metavar="NAME", help=f"{', '.join(PERTURBERS)}; see below (default rules)"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the Parquet parts; continued when begun"
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        metavar="MODEL",
        help="pipeline or tokenizer, folder or hub id, that counts tokens (default for tiny: its own)",
    )
    parser.add_argument(
        "--replace", action="store_true", help="put new captions in the place of those the pairs have"
    )
    parser.add_argument(
        "--max-failed-share",
        type=float,
        default=0.01,
        metavar="X",
        help="fail when more than this share of the rows gets no captions (0 to 1; default 0.01)",
    )
    parser.add_argument(
        "--limit", type=count, default=0, metavar="N", help="only the first N rows (default 0: all)"
    )
    _add_running(parser)
    add_config_arguments(parser, ColumnsConfig, "columns.")
    _add_backends(parser, "captioner", CAPTIONERS)
    _add_backends(parser, "perturber", PERTURBERS)
    return False


def _add_running(parser: Parser) -> None:
    group = parser.add_argument_group("how it runs; nothing here changes a caption")
    engine(group, "one for each GPU, or this process")
    group.add_argument(
        "--batch", type=positive, default=16, metavar="N", help="pairs a backend gets at a time (default 16)"
    )
    add_parts(group, "the pairs")


def _add_backends(parser: Parser, kind: str, known: dict[str, type[Any]]) -> None:
    """Options for the settings of all backends of a kind, and their description. One that several have is one
    option, so each is read when the backend is known."""
    from diffpref.captions.backends import backend_specs, describe_backends

    group = parser.add_argument_group(f"each {kind} with its settings", describe_backends(kind, known))
    for key in dict.fromkeys(key for backend in known.values() for key in backend_specs(backend)):
        group.add_argument(f"--{kind}.{key}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(values: argparse.Namespace, _: Overrides) -> None:
    from diffpref.captions import CAPTIONERS, PERTURBERS
    from diffpref.captions.build import CaptionOptions, caption
    from diffpref.captions.stages import METHODS
    from diffpref.config import ColumnsConfig
    from diffpref.engine import Engine
    from diffpref.errors import nearest

    if values.method not in METHODS:
        close = nearest(values.method, METHODS)
        fix = f"did you mean {close}?" if close else f"methods: {', '.join(METHODS)}"
        raise UserError(f"unknown method {values.method!r}", fix=fix)
    options = CaptionOptions(
        method=values.method,
        captioner=_backend(values, "captioner", CAPTIONERS, "", values.method != "perturbation"),
        perturber=_backend(values, "perturber", PERTURBERS, "rules", values.method != "captioning"),
        tokenizer=values.tokenizer,
        columns=ColumnsConfig(**_dotted(values, "columns")),
        batch=values.batch,
        rows_per_file=values.rows_per_file,
        shard=values.shard,
        limit=values.limit,
        replace=values.replace,
        max_failed_share=values.max_failed_share,
        engine=Engine(values.engine, values.workers),
    )
    caption(values.pairs, Path(values.out), options)


def _backend(
    values: argparse.Namespace, kind: str, known: dict[str, type[Any]], default: str, wanted: bool
) -> Any:
    """The backend of the method, None where it takes none. Raises UserError for one without effect."""
    from diffpref.captions.backends import build_backend

    name, texts = getattr(values, kind), _dotted(values, kind)
    if not wanted:
        given = [f"--{kind}"] * (name is not None) + [f"--{kind}.{key}" for key in texts]
        if given:
            raise UserError(
                f"{given[0]} has no effect with --method {values.method}",
                why=f"that method has no {kind}",
                fix=f"leave it out, or choose --method hybrid, which has a {kind}",
            )
        return None
    if not (name or default):
        raise UserError(
            f"--method {values.method} needs a --{kind}",
            fix=f"choose one of: {', '.join(known)}; see diffpref caption --help",
        )
    return build_backend(kind, name or default, known, texts)


def _dotted(values: argparse.Namespace, prefix: str) -> dict[str, str]:
    found = ((key.partition("."), value) for key, value in vars(values).items())
    return {key: value for (head, dot, key), value in found if head == prefix and dot}
