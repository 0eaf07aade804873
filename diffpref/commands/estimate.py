"""`diffpref estimate`."""

from __future__ import annotations

import argparse
import json

from diffpref.commands.arguments import Overrides, Parser, add_config_file

SUMMARY = "Say what a run takes before it starts: memory of the GPU, and FLOPs."

NOTES = """
No weights are loaded and no pairs are read. Of a hub id only the configs are fetched; without a network
--model.base architecture:NAME stands for a published model: sd15, sd21-base, sd21 or sdxl.

  diffpref estimate sd15-dpo --model.base architecture:sd15 --gpu-memory 80
  diffpref estimate my.toml --adapter.type lora --train.micro_batch auto --gpu-memory 24

Memory is that of tensors at the peak of a step on a GPU, in one process. train.micro_batch = "auto" is taken
as the largest that fits into --gpu-memory, or as 1 without it. Not counted: sampling, validation, building
the cache, torch.compile, the buffers of several processes. FLOPs are 2 per multiply-add of matrix products
and convolutions, and in the backward pass only those that are done: none for frozen weights.
"""


def add_arguments(parser: Parser) -> bool:
    add_config_file(parser)
    parser.usage = f"{parser.prog} CONFIG [--section.key VALUE ...] [--gpu-memory GIB] [--json]"
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="memory of the GPU, such as 24 or 80: says whether the run fits, and its largest micro-batch",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead: bytes, FLOPs and pairs")
    parser.description = f"{parser.description}\n{NOTES}"
    return True


def run(values: argparse.Namespace, overrides: Overrides) -> None:
    from diffpref.config import load_train_config

    config = load_train_config(values.config, overrides)
    from diffpref.estimate import estimate
    from diffpref.estimate.table import describe

    found = estimate(config, values.gpu_memory)
    print(json.dumps(found.as_json(), indent=2) if values.json else describe(found))
