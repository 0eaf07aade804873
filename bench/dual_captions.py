"""DCPO's three methods, the perturbations at three levels, against DPO on the prompt; on the small world.

    python bench/dual_captions.py --seeds 0 1 2 --out runs/dual-captions

Captions the shipped pairs in seven ways (`diffpref caption`: oracle and rules), trains the recipe tiny-dcpo
on each and on the prompts alone, all else equal, and judges each result on the suite `tiny`. The same command
continues what was stopped. Prints the tables of bench/recipes.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes import Combination, Judging, Sweep
from script import printed

from diffpref.captions import CAPTIONERS, LEVELS, PERTURBERS
from diffpref.captions.build import CaptionOptions, caption

PAIRS = "tiny:pairs/train.parquet"
RECIPE = "tiny-dcpo"
FIXED = (("data.validation", ""), ("validation.every", "0"), ("checkpoint.every", "0"))


def methods() -> dict[str, CaptionOptions]:
    """How each set of captions is made, by the name that the paper's tables use."""
    oracle, rules = CAPTIONERS["oracle"](), PERTURBERS["rules"]
    options = {"dcpo-c": CaptionOptions("captioning", oracle, replace=True)}
    for level in LEVELS:
        worse = rules(level=level)  # type: ignore[call-arg]  # its own parameter
        options[f"dcpo-p-{level}"] = CaptionOptions("perturbation", None, worse, replace=True)
        options[f"dcpo-h-{level}"] = CaptionOptions("hybrid", oracle, worse, replace=True)
    return options


def plan(captioned: Path, seeds: Sequence[int], threads: int) -> list[Combination]:
    """DPO on the prompts first, then each method, each with every seed."""
    fixed = (*FIXED, ("train.threads", str(threads)))
    sets = {"dpo": (("data.captions", "shared"),)} | {
        name: (("data.pairs", str(captioned / name)),) for name in methods()
    }
    return [Combination(RECIPE, (*fixed, *own), seed, name) for name, own in sets.items() for seed in seeds]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default 0")
    parser.add_argument("--suite", default="tiny", help="default tiny")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only its first N prompts")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of the training (default 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/dual-captions"), help="its default")
    values = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    captioned = values.out / "pairs"

    def run() -> str:
        for name, options in methods().items():
            print(f"\n== captions of {name}", flush=True)
            caption(PAIRS, captioned / name, options)
        judging = Judging(values.suite, values.limit, 40, ("oracle",))
        return "\n" + Sweep(values.out, judging).run(plan(captioned, values.seeds, values.threads), "dpo")

    return printed(run)


if __name__ == "__main__":
    sys.exit(main())
