"""Evaluators against the published loops over single images, on random weights of real shapes.

    python bench/evaluators.py --size B-32 --threads 1                # all that can run here
    python bench/evaluators.py --size H-14 --device cuda --dtype bf16 --evaluators pickscore hps-v2 \\
        --pairs 256 --batch 64

A pair is two images and a prompt. The reference loop (evaluator_loops.py) scores one image, or the one pair
that its repository shows, at a time; ours gets the same lists at once. Both take turns in one process, caches
emptied before every turn, after a first turn whose scores must be equal.

distinct   every image and prompt is new
repeated   some images of a prompt (--group, four), all pairs of them, as preference accuracy and best-of-n
           comparisons have it; a loop scores each of them group - 1 times

What takes no part is named: HPS where open_clip or torchvision is missing, and models of 7 billion weights.
The oracle has no reference. GenEval's detector gets weights that see things (evaluator_models.py), since it
would find nothing with plain random ones, and the bench ends with an error where no object was found or no
colour named. Below the table stands
the share of the measured matmul rate that the image tower reaches (goal on a GPU: 0.6).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from counting import flops_of
from racing import CLOCKS, spread
from script import printed

from diffpref.errors import UserError
from diffpref.torchvision_ops import mend_torchvision

mend_torchvision()  # transformers imports torchvision where it is

from evaluator_contests import CONTESTS, SAME, TOO_LARGE, Contest, Setting, distinct, repeated  # noqa: E402
from evaluator_loops import GenEvalLoop, Pair  # noqa: E402
from evaluator_models import SIZES  # noqa: E402

from diffpref.evaluators.clip import DTYPES, Clip  # noqa: E402

TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}
"""Of scores, relative to the largest where that is above 1: rounding differs with the rows of a product."""
WORKLOADS = {"distinct": distinct, "repeated": repeated}
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}


def check(contest: Contest, pairs: Sequence[Pair], values: argparse.Namespace) -> None:
    """A turn of each side. Raises UserError where their scores differ, or where scores tell nothing apart."""
    scores, details = contest.ours(pairs, values.batch)
    if contest.loop is None:
        return
    expected = contest.loop(pairs)
    allowed = TOLERANCE[values.dtype] * max(1.0, float(np.abs(expected).max()))
    worst = float(np.abs(scores - expected).max())
    if not worst <= allowed:
        raise UserError(
            f"{contest.evaluator.name} and its reference loop compute different things",
            why=f"their scores differ by up to {worst:.3g}, {allowed:.3g} is rounding",
        )
    if isinstance(contest.loop, GenEvalLoop):
        check_found([text for part in details for text in part["found"]], contest.loop)
    elif values.dtype == "fp32" and np.ptp(expected) < 100 * allowed:
        raise UserError(f"with these weights {contest.evaluator.name} scores all images {expected[0]:.6g}")


def check_found(listed: Sequence[str], loop: GenEvalLoop) -> None:
    """The same objects and colours on both sides, and some of each: verdicts of 0 and 1 alone say little."""
    for ours, (counts, colors) in zip(listed, loop.seen, strict=True):
        named = {name: f" ({color})" for name, color in colors.items()}
        theirs = {f"{n} {name}{named.get(name, '')}" for name, n in counts.items()}
        if set(ours.split(", ")) != (theirs or {"nothing"}):
            raise UserError("geneval and its reference loop see different things", why=f"{ours}; {theirs}")
    if not any(counts for counts, _ in loop.seen) or not any(colors for _, colors in loop.seen):
        raise UserError("the random detector found nothing, or nothing to name the colour of")


def turns(contenders: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each: of the CPU where it computes, of the wall where a GPU does. Turns rotate."""
    clock = CLOCKS["wall" if device.startswith("cuda") else "cpu"]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = clock()
            contenders[name]()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times[name].append(clock() - started)
    return {name: np.array(values) for name, values in times.items()}


def row(name: str, contest: Contest, kind: str, values: argparse.Namespace) -> str:
    """One line of the table: pairs a second on either side, and how many times the loop's they are ours."""
    pairs = WORKLOADS[kind](contest, values)
    check(contest, pairs, values)
    loop = contest.loop
    contenders: dict[str, Callable[[], object]] = {"ours": lambda: contest.ours(pairs, values.batch)}
    if loop is not None:
        contenders["loop"] = lambda: loop(pairs)
    times = turns(contenders, values.rounds, values.device)
    cells = [name, kind, spread(len(pairs) / times["ours"], ".2f"), "none", ""]
    if loop is not None:
        cells[3:] = [spread(len(pairs) / times["loop"], ".2f"), spread(times["loop"] / times["ours"], ".2f")]
    return f"| {' | '.join(cells)} |"


def matmul_share(clip: Clip, values: argparse.Namespace) -> str:
    """What the image tower reaches of the rate of one large product of the same dtype."""
    network, dtype, side = clip.network, DTYPES[values.dtype], MATMUL_SIDE[clip.network.device.type]
    pixels = torch.randn(clip._pass, 3, clip.pixels.size, clip.pixels.size, device=values.device, dtype=dtype)
    a = torch.randn(side, side, device=values.device, dtype=dtype)
    with torch.inference_mode():
        flops = flops_of(lambda: network.encode_images(pixels[:1])) * len(pixels)
        calls = {"product": lambda: a @ a, "tower": lambda: network.encode_images(pixels)}
        turns(calls, 3, values.device)
        times = turns(calls, 12, values.device)
    reached, rate = flops / times["tower"], 2 * side**3 / times["product"]
    medians = f"{np.median(reached) / 1e9:.0f} of {np.median(rate) / 1e9:.0f} GFLOP/s"
    return f"{spread(reached / rate, '.2f')} of the matmul rate, {medians}"


def run(values: argparse.Namespace) -> str:
    """Prints a row as soon as it is measured; returns what comes below the table."""
    setting = Setting(values)
    notes = [f"{name} has the network and the loop of {other}" for name, other in SAME.items()]
    notes += [f"{name} is too large to take part" for name in TOO_LARGE]
    shares: dict[str, str] = {}
    print(
        "| evaluator | pairs | pairs/s | the published loop | ratio |\n| --- | --- | --- | --- | --- |",
        flush=True,
    )
    for name in values.evaluators:
        try:
            contest = CONTESTS[name](setting)
        except UserError as error:
            notes.append(f"**{name} is left out**: {' '.join(str(error).split())}")
            continue
        for kind in values.workloads:
            print(row(name, contest, kind, values), flush=True)
        clip = contest.clip
        if clip is not None and clip.network.weights not in shares:
            shares[clip.network.weights] = f"image tower of {name}: {matmul_share(clip, values)}"
    return "\n".join(["", *(f"- {note}" for note in [*shares.values(), *notes, _about(values)])])


def _about(values: argparse.Namespace) -> str:
    cuda = values.device.startswith("cuda")
    where = torch.cuda.get_device_name(values.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{where}, {values.dtype}, torch {torch.__version__}, size {values.size}, {values.pairs} pairs of "
        f"{values.side} px images, repeated: {values.group} images of a prompt, calls of {values.batch} "
        f"images; {'wall' if cuda else 'CPU'} time of {values.rounds} rounds, medians, quartiles in brackets"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--evaluators", nargs="+", choices=CONTESTS, default=list(CONTESTS))
    parser.add_argument(
        "--workloads", nargs="+", choices=("distinct", "repeated"), default=["distinct", "repeated"]
    )
    parser.add_argument("--size", choices=SIZES, default="B-32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, default=32, help="images in a call (default 32)")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--group", type=int, default=4, help="images of a prompt in `repeated` (default 4)")
    parser.add_argument("--side", type=int, default=512, help="of the images, in pixels (default 512)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as torch chooses")
    values = parser.parse_args(arguments)
    if values.threads:
        torch.set_num_threads(values.threads)
    return printed(lambda: run(values))


if __name__ == "__main__":
    sys.exit(main())
