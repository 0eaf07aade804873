"""Pairs per second of SD1.5 and SD2.1 at 512 and SDXL at 1024 on one GPU, without data, weights or network.

    python bench/cuda_speed.py --out cuda                                  # ends within ten minutes
    python bench/cuda_speed.py --out cuda --models sdxl                    # all rows of one model
    python bench/cuda_speed.py --out cuda --rows sdxl-1-bf16 'sd15-*-usual'   # these, in this order
    python bench/cuda_speed.py --out cuda --device cpu --size miniature    # to see that it works

Full-size networks of random weights train on a cache of noise through diffpref's own `Stepper`, one switch a
row, beside the usual order of operations (`release.py`) with as many pairs an optimizer step. Speeds are
medians over whole optimizer steps, each waited for. *Of the matmul rate*: a step's model FLOPs a second
(`counting.Flops`; recomputation and adapters not counted) over those of a large bf16 matrix product, measured
in the same process.

Rows run in order of importance until the time is up. Rows that by `diffpref estimate` (cuda_memory.json) need
more memory than the card has are not tried. What was not measured is named, with the reason. OUT/table.md and
OUT/table.json are written after every row.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from counting import Flops
from cuda_memory import figures, too_large, with_smaller
from cuda_rows import BATCH, ROWS, TITLES, Result, Row, markdown
from published import Published
from release import Release
from torch._dynamo.utils import counters

from diffpref.data.cached import EncodedPairs
from diffpref.estimate import GIB
from diffpref.training.stepper import Stepper

MATMUL_SIDE = {"cuda": 8192, "cpu": 256}
MOST_STEPS = 50
NO_TIME = "not run: no time left"
GRACE = 30.0  # seconds that a row may go on after the time is up


class Contender(Protocol):
    def warm(self) -> None: ...

    def step(self, number: int) -> None: ...


class Ours:
    """diffpref's training step."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper

    def warm(self) -> None:
        self.step(-1)

    def step(self, number: int) -> None:
        self._stepper.take(number + 2)
        self._stepper.settle()


class Bench:
    """Measures rows one after another; nothing of a row is left in memory for the next."""

    def __init__(self, values: argparse.Namespace, work: Path, deadline: float) -> None:
        self._values, self._work, self._deadline = values, work, deadline
        self._full = values.size == "full"
        self.device = torch.device(values.device)
        self._models: dict[str, tuple[Published, EncodedPairs, Flops]] = {}
        self._limits = LimitsReached()
        self.memory, self.estimates = gib_of(self.device), figures()

    def measure(self, row: Row) -> Result:
        """Never raises: a row that cannot be measured has a note in place of numbers."""
        result = _named(row) | {"estimated_gb": self.estimates.get(row.name) if self._full else None}
        if row.for_cuda and self.device.type != "cuda":
            return result | {"note": f"not run: {row.for_cuda} is for CUDA"}
        if self._deadline - time.monotonic() < (row.needs if self._full else 0):
            return result | {"note": NO_TIME}
        if self._full and (why := too_large(row, self.memory, self.estimates)):
            return result | {"note": why}
        found = self._attempt(row)
        self._forget()
        return result | found

    def _attempt(self, row: Row) -> Result:
        try:
            return self._timed(row)
        except torch.OutOfMemoryError:
            gib = self.estimates.get(row.name)
            return {"note": f"out of memory{f', against an estimate of {gib:g} GiB' if gib else ''}"}
        except Exception as error:  # a row that fails must not cost the others
            traceback.print_exc()
            return {"note": f"failed: {type(error).__name__}", "error": str(error)[:2000]}

    def _timed(self, row: Row) -> Result:
        model, cache, flops = self._model(row.model)
        counters.clear()
        self._limits.drain()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        contender = self._contender(row, model, cache)
        contender.warm()
        self._wait()
        ready = time.monotonic()
        ends = [ready]
        until = min(ready + self._values.row_seconds, self._deadline)
        while len(ends) == 1 or (ends[-1] < until and len(ends) <= MOST_STEPS):
            contender.step(len(ends) - 1)
            self._wait()
            ends.append(time.monotonic())
        seconds = np.diff(ends)
        on_gpu = self.device.type == "cuda"
        speeds = len(cache) / np.quantile(seconds, [0.5, 0.75, 0.25])
        return {
            "pairs_per_second": speeds.tolist(),
            "seconds_per_step": seconds.tolist(),
            "pairs_per_step": len(cache),
            "seconds_until_ready": ready - started,
            "peak_memory_gb": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
            "flops_per_pair": getattr(flops, row.flops),
            "compiled_graphs": counters["stats"]["unique_graphs"],
            "graph_breaks": [str(reason).splitlines()[0] for reason in counters["graph_break"]],
            "limits_reached": self._limits.drain(),
        }

    def _contender(self, row: Row, model: Published, cache: EncodedPairs) -> Contender:
        if row.switches is None:
            return Release(model, len(cache), row.micro, checkpointing=row.model == "sdxl")
        sizes = {"train.batch_size": len(cache), "train.micro_batch": row.micro}
        work = Path(tempfile.mkdtemp(dir=self._work))  # reference errors are taken anew for every row
        return Ours(model.stepper({**row.switches, **sizes}, cache, work))

    def _model(self, name: str) -> tuple[Published, EncodedPairs, Flops]:
        if name not in self._models:
            model = Published(name, self._full, self.device, self._work)
            cache = model.cache(self._work / f"cache-{name}", BATCH[name] if self._full else 4)
            self._models[name] = model, cache, model.flops()
        return self._models[name]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _forget(self) -> None:
        if self.device.type == "cuda":
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()


class LimitsReached(logging.Handler):
    """Dynamo's warnings that a code object has too many graphs and runs uncompiled from there on: it counts
    them nowhere."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: list[str] = []
        logging.getLogger("torch._dynamo").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "_limit reached" in text or "hit config." in text:
            self._seen.append(text.splitlines()[0])

    def drain(self) -> list[str]:
        seen, self._seen = list(dict.fromkeys(self._seen)), []
        return seen


class Tables:
    """The tables so far, in `folder`; `late` writes them for a row that does not come to an end."""

    def __init__(self, folder: Path, rows: Sequence[Row], rate: float, about: str, goals: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._rows, self._rate, self._about, self._goals = folder, rows, rate, about, goals
        self.results: list[Result] = []

    def add(self, result: Result) -> str:
        """Write the tables with it; returns the readable one."""
        self.results.append(result)
        return self._write(self.results)

    def late(self) -> None:
        left = self._rows[len(self.results) :]
        notes = ["cut off: the time is up", *[NO_TIME] * len(left)]
        late = [_named(row) | {"note": note} for row, note in zip(left, notes, strict=False)]
        print(self._write([*self.results, *late]), flush=True)

    def _write(self, results: list[Result]) -> str:
        table = markdown(results, self._rate, self._goals, self._about)
        (self._folder / "table.md").write_text(table + "\n")
        numbers = {"about": self._about, "matmul_flops_per_second": self._rate, "rows": results}
        (self._folder / "table.json").write_text(json.dumps(numbers, indent=1) + "\n")
        return table


def _named(row: Row) -> Result:
    return {"model": row.model, "what": row.what, "how": row.how, "micro_batch": row.micro}


@contextmanager
def ended_at(moment: float, tables: Tables) -> Iterator[None]:
    """End the process when the monotonic clock reaches `moment` inside the block, tables written.

    A signal would not do: its handler runs in the main thread, which waits in C++ while autograd's own thread
    compiles a backward pass.
    """

    def end() -> None:
        tables.late()
        sys.stderr.flush()
        os._exit(0)

    watch = threading.Timer(max(moment - time.monotonic(), 0.001), end)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def gib_of(device: torch.device) -> float:
    """Memory of a GPU; of a CPU, where only miniatures run, more than any row needs."""
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else math.inf


def matmul_rate(device: torch.device, seconds: float) -> float:
    """FLOP/s of a large bf16 matrix product on random data, sustained: the median after as long a warm-up."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    started = time.perf_counter()
    while not times or time.perf_counter() - started < 2 * seconds:
        wait()
        before = time.perf_counter()
        for _ in range(10):
            a @ b
        wait()
        times.append((time.perf_counter() - before) / 10)
    return 2.0 * side**3 / statistics.median(times[len(times) // 2 :])


def chosen(values: argparse.Namespace) -> list[Row]:
    """Rows asked for; of miniatures only two pairs run at once, which makes some rows equal.

    Raises ValueError for a name that is no row's.
    """
    rows = [row for row in ROWS if row.model in values.models]
    if values.rows:
        rows = [row for name in values.rows for row in _matching(name)]
    if values.size == "miniature":
        rows = [replace(row, micro=min(row.micro, 2)) for row in rows]
    return [row for number, row in enumerate(rows) if row.name not in {one.name for one in rows[:number]}]


def _matching(name: str) -> list[Row]:
    """Of a name, or of a pattern such as sd15-*-usual."""
    return [row for row in ROWS if fnmatchcase(row.name, name)] or [Row.named(name)]


def run(values: argparse.Namespace, work: Path) -> list[Result]:
    deadline = time.monotonic() + 60 * values.minutes
    bench = Bench(values, work, deadline)
    rate = matmul_rate(bench.device, 2.0 if values.size == "full" else 0.05)
    rows, table = with_smaller(chosen(values), bench.memory, bench.estimates), ""
    tables = Tables(values.out, rows, rate, _about(values, bench.device, rate), values.size == "full")
    with ended_at(deadline + GRACE, tables):
        for row in rows:
            print(row.name, file=sys.stderr, flush=True)
            table = tables.add(bench.measure(row))
    print(table)
    return tables.results


def _about(values: argparse.Namespace, device: torch.device, rate: float) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    side = MATMUL_SIDE[device.type]
    return (
        f"{where}, torch {torch.__version__}, {values.size} size, random weights, cudnn.benchmark "
        f"{'on' if values.cudnn_benchmark else 'off'}; bf16 matmul {side}\u00b3: {rate / 1e12:.3g} TFLOP/s; "
        "pairs/s are medians (quartiles in brackets) over optimizer steps"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("cuda"), help="folder for table.md and table.json")
    parser.add_argument("--models", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these alone, in this order; also patterns")
    parser.add_argument(
        "--list",
        action="store_true",
        help="print the names of all rows and the GiB that they need by estimate, and end",
    )
    parser.add_argument("--minutes", type=float, default=9, help="no row starts after them (default 9)")
    parser.add_argument("--row-seconds", type=float, default=6, help="timed seconds of a row (default 6)")
    parser.add_argument("--device", choices=MATMUL_SIDE, default="cuda")
    parser.add_argument("--size", choices=("full", "miniature"), default="full")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its kernels; a trial")
    values = parser.parse_args(arguments)
    if values.list:
        known = figures()
        print("\n".join(f"{row.name:32} {known.get(row.name, '')}".rstrip() for row in ROWS))
        return 0
    try:
        chosen(values)
    except ValueError as error:
        print(f"error: --rows: {error}", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = values.cudnn_benchmark
    if values.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device; to see that it works: --device cpu --size miniature", file=sys.stderr)
        return 2
    if values.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as work:
        results = run(values, Path(work))
    return 1 if any(str(one.get("note", "")).startswith("failed") for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
