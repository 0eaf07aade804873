"""`diffpref estimate`."""

from __future__ import annotations

import argparse
import json

from diffpref.commands.arguments import Overrides, Parser, add_config_file, positive

SUMMARY = "Say what a run takes before it starts: memory of the GPU, disk, FLOPs and hours."

NOTES = """
No weights are loaded and no pairs are read. Of a hub id only the configs are fetched; without a network
--model.base architecture:NAME stands for a published model: sd15, sd21-base, sd21 or sdxl.

  diffpref estimate sd15-dpo --model.base architecture:sd15 --gpu-memory 80
  diffpref estimate my.toml --adapter.type lora --train.micro_batch auto --gpu-memory 24
  diffpref estimate sdxl-dpo --gpus 8 --gpu-memory 80 --tflops 989 --share 0.4

Memory is that of tensors at the peak of a step on each GPU, which all hold the whole model.
train.micro_batch = "auto" is taken as the largest that fits into --gpu-memory, or as 1 without it. Not
counted: sampling, validation, building the cache, torch.compile, the buffers of several processes. FLOPs are
2 per multiply-add of matrix products and convolutions, and in the backward pass only those that are done:
none for frozen weights. Hours are FLOPs of all steps over --share of --tflops: no measurement, and without
encoding, sampling and validation.
"""


def add_arguments(parser: Parser) -> bool:
    add_config_file(parser)
    options = "[--gpu-memory GIB] [--gpus N] [--tflops RATE] [--share X] [--json]"
    parser.usage = f"{parser.prog} CONFIG [--section.key VALUE ...] {options}"
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="memory of the GPU, such as 24 or 80: says whether the run fits, and its largest micro-batch",
    )
    parser.add_argument(
        "--gpus", type=positive, default=1, metavar="N", help="GPUs that share each step (default 1)"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="RATE",
        help="TFLOP/s of dense matrix products of one GPU in the run's precision, by its maker: says how "
        "many hours the run takes",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.4,
        metavar="X",
        help="share of that rate which training reaches: an assumption, measure your own (default 0.4)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead: bytes, FLOPs and pairs")
    parser.description = f"{parser.description}\n{NOTES}"
    return True


def run(values: argparse.Namespace, overrides: Overrides) -> None:
    from diffpref.config import load_train_config

    config = load_train_config(values.config, overrides)
    from diffpref.estimate import Hardware, estimate
    from diffpref.estimate.table import describe

    found = estimate(config, Hardware(values.gpus, values.gpu_memory, values.tflops, values.share))
    print(json.dumps(found.as_json(), indent=2) if values.json else describe(found))
