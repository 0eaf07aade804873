"""`diffpref evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpref.commands.arguments import (
    Overrides,
    Parser,
    add_evaluators,
    add_suite,
    add_version,
    evaluator_names,
    positive,
    sampling,
)

SUMMARY = "Draw a suite with several models, score the images and write the report."

NOTES = """
  diffpref evaluate --baseline tiny:model --candidate RUN/model other=OTHER/model \\
      --suite tiny-demo --evaluators oracle --out runs/compared

MODEL is a pipeline folder, a run folder, a LoRA of diffpref train, a hub id, or a folder that diffpref
generate drew already; NAME=MODEL names it in the report. The same command goes on after a stop, and uses
what is finished.
"""


def add_arguments(parser: Parser) -> bool:
    parser.description = f"{parser.description}\n{NOTES}"
    parser.add_argument("--baseline", required=True, metavar="MODEL", help="model to compare with")
    parser.add_argument(
        "--candidate",
        required=True,
        action="append",
        nargs="+",
        metavar="MODEL",
        help="models to compare; repeatable",
    )
    add_version(parser, "of the models")
    add_suite(parser)
    add_evaluators(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for images, scores and report.html"
    )
    parser.add_argument(
        "--draw-batch", type=positive, default=16, metavar="N", help="images drawn together (default 16)"
    )
    parser.add_argument(
        "--draw-dtype",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="precision inside the drawing network (default fp32)",
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="compare without images that cannot be scored"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="compare folders whose sampling settings, prompts or seeds differ; the report lists how",
    )
    parser.add_argument("--title", default="", metavar="TEXT", help="title of the report")
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    from diffpref.evaluation import Plan, contestant, describe_precision, evaluate
    from diffpref.processes import launched
    from diffpref.reporting.tables import markdown_table
    from diffpref.scoring import runtime_of

    names = [values.baseline, *(name for group in values.candidate for name in group)]
    plan = Plan(
        values.suite, sampling(values), values.limit, values.draw_batch, values.device, values.draw_dtype,
        values.revision, values.variant,
    )  # fmt: skip
    out = Path(values.out)
    with launched() as processes:
        numbers = evaluate(
            [contestant(name) for name in names],
            plan,
            evaluator_names(values.evaluators),
            out,
            runtime=runtime_of(values.device, values.dtype, processes),
            weights=dict(values.weights),
            score_batch=values.batch,
            allow_missing=values.allow_missing,
            force=values.force,
            title=values.title,
            processes=processes,
        )
    if numbers is None:
        return
    print(markdown_table(numbers))
    print(f"\n{numbers['headline']}\n{describe_precision(numbers)}")
    for difference in numbers["setting_differences"]:
        print(f"settings differ: {difference}")
    print(out / "report.html")
