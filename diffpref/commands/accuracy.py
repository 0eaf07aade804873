"""`diffpref accuracy`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffpref.commands.arguments import (
    Overrides,
    Parser,
    add_evaluator_runtime,
    add_version,
    count,
    pair,
    positive,
    timesteps,
)
from diffpref.errors import UserError

SUMMARY = "Say how often an evaluator, or a model's implicit reward, agrees with labelled pairs."

NOTES = """
  diffpref accuracy --evaluator pickscore --pairs test.parquet --tie-pairs validation.parquet
  diffpref accuracy --model RUN/model --pairs tiny:pairs/validation.parquet

Ties count as in PickScore's protocol: the scores become probabilities by a softmax, a tie is predicted when
they differ by the threshold or less, and a pair gives half a point when exactly one of label and prediction
is a tie. The implicit reward of an image is the mean over draws of reference error minus model error.
"""
REWARD_SCALE = 1000.0  # beta / 2 of Diffusion-DPO at its default beta of 2000


def add_arguments(parser: Parser) -> bool:
    parser.description = f"{parser.description}\n{NOTES}"
    parser.add_argument(
        "--pairs", required=True, metavar="PAIRS", help="Parquet file, folder of them, or glob, ties included"
    )
    parser.add_argument("--evaluator", metavar="NAME", help="evaluator to measure, such as oracle")
    parser.add_argument("--model", metavar="MODEL", help="model whose implicit reward to measure; LoRA too")
    parser.add_argument(
        "--reference", metavar="MODEL", help="what --model was trained from (default: what its folder says)"
    )
    add_version(parser, "of --model and --reference")
    parser.add_argument("--draws", type=positive, metavar="K", help="noises per pair (default 8; --model)")
    parser.add_argument("--seed", type=count, metavar="S", help="of the noises (default 0; --model)")
    parser.add_argument(
        "--timesteps", type=timesteps, metavar="A-B", help="to draw from (default: all; --model)"
    )
    parser.add_argument(
        "--resolution", type=positive, metavar="N", help="side in pixels (default: the model's own; --model)"
    )
    parser.add_argument(
        "--tie-pairs", metavar="PAIRS", help="other pairs, on which the tie threshold is chosen"
    )
    parser.add_argument(
        "--tie-threshold", type=float, metavar="X", help="difference of probabilities (default 0)"
    )
    parser.add_argument(
        "--scale",
        type=float,
        metavar="X",
        help=f"factor of the scores before the softmax (default 1; {REWARD_SCALE:g} with --model)",
    )
    parser.add_argument(
        "--captions", choices=("shared", "dual"), default="shared", help="one caption or one for each image"
    )
    parser.add_argument(
        "--columns", type=pair, nargs="+", action="extend", default=[], metavar="KEY=NAME",
        help="names of the columns, such as caption=prompt image_0=left image_1=right label_0=won",
    )  # fmt: skip
    parser.add_argument("--out", metavar="F.json", help="the result (default accuracy-NAME.json)")
    parser.add_argument(
        "--allow-missing", action="store_true", help="leave out pairs with missing or damaged images"
    )
    add_evaluator_runtime(parser)
    return False


def run(values: argparse.Namespace, _: Overrides) -> None:
    _check(values)
    from diffpref.accuracy import describe, measure
    from diffpref.accuracy.pairs import LabelledPairs, columns_of
    from diffpref.processes import launched

    columns = columns_of(dict(values.columns))
    with launched() as processes:
        pairs = LabelledPairs(values.pairs, columns, values.captions)
        ties = LabelledPairs(values.tie_pairs, columns, values.captions) if values.tie_pairs else None
        scorer, name = _scorer(values, processes)
        out = Path(values.out or f"accuracy-{name}.json")
        found = measure(
            scorer, pairs, out, ties, values.tie_threshold or 0.0, values.allow_missing, processes
        )
        if processes.main:
            print(f"{describe(found)}\n{out}")


def _scorer(values: argparse.Namespace, processes: Any) -> tuple[Any, str]:
    from dataclasses import replace

    from diffpref.accuracy.scorers import evaluator_scorer, reward_scorer
    from diffpref.scoring import load_judges, runtime_of

    runtime = runtime_of(values.device, values.dtype, processes)
    if values.evaluator:
        judge = load_judges([values.evaluator], values.batch, runtime, dict(values.weights), processes)[0]
        scorer = evaluator_scorer(judge, values.batch, processes)
        return replace(scorer, scale=values.scale or 1.0), judge.name
    from diffpref.accuracy.reward import ImplicitReward, RewardOptions
    from diffpref.evaluation import label_of
    from diffpref.pipelines import check_recorded_base, recorded_base, versioned

    model = versioned(values.model, values.revision, values.variant)
    given = versioned(values.reference, values.revision, values.variant) if values.reference else None
    reference = given or recorded_base(values.model)
    low, high = values.timesteps or (0, -1)
    options = RewardOptions(
        values.draws or 8, values.seed or 0, low, high, values.resolution or 0, runtime.device, values.dtype
    )
    reward = ImplicitReward(model, reference, options)
    if given is None:
        check_recorded_base(values.model, reward.family.fingerprint())
    names = {"model": values.model, "reference": reference.base}
    scale = values.scale or REWARD_SCALE
    return reward_scorer(reward, names, values.batch, scale, processes), label_of(values.model)


def _check(values: argparse.Namespace) -> None:
    if bool(values.evaluator) == bool(values.model):
        raise UserError("give --evaluator or --model, one of the two")
    if values.evaluator:
        for option in ("reference", "draws", "seed", "timesteps", "resolution", "revision", "variant"):
            if getattr(values, option) not in (None, ""):
                raise UserError(f"--{option} has no effect with --evaluator")
    elif values.weights:
        raise UserError("--weights has no effect with --model")
    if values.tie_pairs and values.tie_threshold is not None:
        raise UserError(
            "--tie-pairs chooses the threshold that --tie-threshold gives", fix="give one of them"
        )
    if values.tie_threshold is not None and not 0 <= values.tie_threshold <= 1:
        raise UserError("--tie-threshold lies between 0 and 1", why=f"it is {values.tie_threshold:g}")
    if values.scale is not None and not 0 < values.scale < float("inf"):
        raise UserError("--scale must be above 0", why=f"it is {values.scale:g}")
    if values.out and not values.out.endswith(".json"):
        raise UserError("--out must end in .json", why=f"it is {values.out}")
