"""`diffpref generate`."""

from __future__ import annotations

import argparse

from diffpref.commands.arguments import (
    Overrides,
    Parser,
    add_device,
    add_suite,
    add_version,
    positive,
    sampling,
)

SUMMARY = "Draw a suite of prompts with a model."


def add_arguments(parser: Parser) -> bool:
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="pipeline folder, hub id, or tiny:model"
    )
    add_version(parser, "of MODEL")
    parser.add_argument("--lora", metavar="LORA", help="folder of a LoRA to put on the model")
    add_suite(parser)
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder for images/ and manifest.jsonl; continued when begun",
    )
    parser.add_argument(
        "--batch", type=positive, default=16, metavar="N", help="images drawn together (default 16)"
    )
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="precision inside the network (default fp32)",
    )
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    from diffpref.config import ModelConfig
    from diffpref.generation import generate
    from diffpref.processes import launched

    with launched() as processes:
        folder = generate(
            ModelConfig(base=values.model, revision=values.revision, variant=values.variant),
            values.suite,
            values.out,
            lora=values.lora,
            limit=values.limit,
            batch=values.batch,
            device=values.device,
            dtype=values.dtype,
            sampling=sampling(values),
            processes=processes,
        )
    if processes.main:
        print(folder)
