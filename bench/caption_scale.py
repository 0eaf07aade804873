"""A hundred thousand pairs through `diffpref convert` and `diffpref caption`: rows/s, memory, and a profile.

    python bench/caption_scale.py                         # 100,000 rows
    python bench/caption_scale.py --rows 2000             # to see that it works, a minute
    python bench/caption_scale.py --method perturbation   # without the captioner

Rows are made from the images of the small world's pairs, as JPEG, and from the tests' prompts. Both commands
run as a user runs them, with --workers processes; memory is the resident memory of the whole process tree,
sampled five times a second, pages that processes share counted for each. The profile is of one process that
goes through the stages of both one after the other, in CPU time.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import itertools
import json
import pstats
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffpref.captions import OracleCaptioner, RulePerturber
from diffpref.captions.making import CaptionJob
from diffpref.captions.parts import CaptionWriter
from diffpref.captions.progress import Progress
from diffpref.captions.source import SliceReader, open_source
from diffpref.captions.stages import add_columns, decode, losers, make
from diffpref.captions.tally import CaptionTally
from diffpref.data.convert import ConvertOptions, convert
from diffpref.data.schema import PickAPicColumns
from diffpref.paths import TINY_ASSETS

PROMPTS = Path(__file__).parents[1] / "tests/data/prompts.txt"
FILE_ROWS, GROUP_ROWS = 10_000, 500
SECONDS = 0.2
SHOWN = 24


def jpegs() -> list[bytes]:
    """The images of the shipped pairs as JPEG."""
    table = pq.read_table(TINY_ASSETS / "pairs/train.parquet", columns=["jpg_0", "jpg_1"])
    found = []
    for cell in itertools.chain(table["jpg_0"].to_pylist(), table["jpg_1"].to_pylist()):
        stream = io.BytesIO()
        Image.open(io.BytesIO(cell)).convert("RGB").save(stream, "JPEG", quality=95)
        found.append(stream.getvalue())
    return found


def write_source(folder: Path, rows: int) -> None:
    """Files of pairs in Pick-a-Pic's columns: every pair of images and every prompt another one."""
    images, draw = jpegs(), random.Random(0)
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    for start in range(0, rows, FILE_ROWS):
        found = []
        for number in range(start, min(start + FILE_ROWS, rows)):
            first, second = draw.sample(images, 2)
            text = f"{draw.choice(prompts)}, {draw.choice(prompts).split(',')[-1].strip()} {number}"
            label = draw.choice([0.0, 1.0, 1.0, 0.0, 0.5])
            found.append({"caption": text, "jpg_0": first, "jpg_1": second, "label_0": label})
        path = folder / f"pairs-{start // FILE_ROWS:04d}.parquet"
        pq.write_table(pa.Table.from_pylist(found), path, row_group_size=GROUP_ROWS)


class Memory:
    """Resident memory of a process and all below it, sampled while it runs: GiB over time."""

    def __init__(self, pid: int) -> None:
        self._root, self.samples, self._ended = psutil.Process(pid), [], threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._ended.wait(SECONDS):
            total = 0
            try:
                for process in [self._root, *self._root.children(recursive=True)]:
                    total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            self.samples.append(total / 2**30)

    def stop(self) -> tuple[float, float, float]:
        """The peak, and the medians of the second and of the last quarter."""
        self._ended.set()
        self._thread.join()
        quarter = max(len(self.samples) // 4, 1)
        middle = [sorted(part)[len(part) // 2] for part in (self.samples[quarter : 2 * quarter + 1],
                                                            self.samples[-quarter:])]  # fmt: skip
        return max(self.samples), middle[0], middle[1]


def run(rows: int, name: str, *arguments: object) -> str:
    """Run a command; a row of the table."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "diffpref", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    memory = Memory(process.pid)
    if process.wait():
        raise SystemExit(f"{name} failed")
    seconds = time.monotonic() - start
    peak, early, late = memory.stop()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    times = f"{seconds:,.0f} | {busy:,.0f} | {rows / seconds:,.1f}"
    figures = f"{peak:.2f} | {early:.2f} | {late:.2f}"
    return f"| {name} | {rows:,} | {times} | {figures} |"


def caption_alone(pairs: Path, out: Path, method: str) -> cProfile.Profile:
    """The stages of `diffpref caption` one after the other, without threads, so that a profile sees all."""
    columns = PickAPicColumns()
    source = open_source(str(pairs), columns)
    captioner = OracleCaptioner() if method == "hybrid" else None
    job = CaptionJob(
        source, out, columns, method, captioner, RulePerturber(), "tiny:model", False, 16, 10**9, 0
    )
    makers = (captioner.provenance() if captioner else None, RulePerturber().provenance())
    tally, counter = CaptionTally(), job.counter
    assert counter is not None
    profiler = cProfile.Profile(time.process_time)
    profiler.enable()  # what is loaded once is not of interest
    with (
        open(out / "part.parquet", "wb") as stream,
        Progress(out / "progress.jsonl") as progress,
        CaptionWriter(stream, job.schema(), (columns.image_0, columns.image_1)) as writer,
    ):
        for piece in SliceReader(source, job.batch).read(0, source.rows):
            made = make(decode(piece, columns, captioner is not None), method, captioner, job.perturber)
            progress.add(made)
            table = add_columns(piece, made, columns, makers, counter.count)
            writer.add(table)
            tally.add(piece, made, table, losers(piece, columns))
        writer.close(tally)
    profiler.disable()
    return profiler


def table(title: str, profiler: cProfile.Profile) -> str:
    """A table of the functions with the largest share of the CPU time, what is below them counted."""
    stats = pstats.Stats(profiler)
    total = stats.total_tt
    lines = [f"\n{title}: {total:.1f} s of CPU time\n", "| function | with all below | itself | calls |",
             "| --- | --- | --- | --- |"]  # fmt: skip
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][3])
    shown = 0
    for (file, _, function), (_, calls, own, cumulative, _) in rows:
        if cumulative > 0.98 * total and not own > 0.02 * total:
            continue  # what merely calls the rest
        place = f"{Path(file).stem}." if file != "~" else ""
        lines.append(f"| {place}{function} | {cumulative / total:.1%} | {own / total:.1%} | {calls:,} |")
        shown += 1
        if shown == SHOWN:
            break
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--method", choices=("hybrid", "perturbation"), default="hybrid")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--profile-rows", type=int, default=2_000)
    parser.add_argument("--folder", type=Path, help="where everything is written (default: a temporary one)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="caption-scale-"))
    try:
        measure(args, folder)
    finally:
        shutil.rmtree(folder)


def measure(args: argparse.Namespace, folder: Path) -> None:
    source, sample = folder / "source", folder / "sample"
    for place, rows in ((source, args.rows), (sample, args.profile_rows)):
        place.mkdir()
        write_source(place, rows)
    print("| command | rows | seconds | CPU seconds | rows/s | peak GiB | second quarter | last quarter |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    workers = ("--workers", args.workers)
    print(
        run(args.rows, "convert", "convert", source, "--out", folder / "pairs", "--keep-ties", *workers),
        flush=True,
    )
    kept = json.loads((folder / "pairs/report.json").read_text())["kept"]
    captioner = ("--captioner", "oracle") if args.method == "hybrid" else ()
    command = ("caption", "--pairs", folder / "pairs", "--out", folder / "captioned", "--method", args.method)
    options = (*captioner, "--tokenizer", "tiny:model", *workers)
    print(run(kept, f"caption, {args.method}", *command, *options), flush=True)
    alone, quiet = folder / "alone", io.StringIO()
    alone.mkdir()
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(convert, str(sample), folder / "profiled", ConvertOptions(), quiet)
    print(table("convert", profiler))
    print(table(f"caption, {args.method}", caption_alone(folder / "profiled", alone, args.method)))


if __name__ == "__main__":
    main()
