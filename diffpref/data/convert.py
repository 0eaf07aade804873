"""`diffpref convert`: preference pairs in the formats of the wild into Parquet in Pick-a-Pic's columns.

    OUT/settings.json       written first: what is converted and how; another conversion is refused there
    OUT/part-00000.parquet  the pairs kept of the first `rows_per_file` rows, with their tally in the footer
    OUT/report.json         the counts of all parts
    OUT/manifest.json       written last: the folder is complete

Part n holds what is kept of the rows n * rows_per_file and following, so that it depends on the source alone:
a conversion that was killed at any moment goes on with the missing parts, and ends in the same bytes.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from diffpref.data.convert_report import build_report, table
from diffpref.data.disk import told_when_disk_is_full
from diffpref.data.judge import judge_all
from diffpref.data.outfolder import REPORT, claim, describe_files, finished_report, write_manifest
from diffpref.data.parts import PartWriter, await_writer, part_path, part_schema, staged
from diffpref.data.sources import SOURCES, hub, open_source
from diffpref.data.sources.base import Candidate, Request, Source
from diffpref.engine import Engine, Worker, require_engine, require_shard, run_units
from diffpref.errors import UserError
from diffpref.paths import atomic_write_text, resolve, resolve_or_hub_id

FORMAT = 1
ROWS_PER_FILE = 1000


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert.

    images: folder that paths in lists start at. columns: names of the source's columns by our keys.
    rows_per_file: source rows that one part covers, kept or not. shard: (i, n): this process makes every n-th
    part from part i on. max_bad_share: share of the rows (0..1) that may be bad; all are reported anyway.
    workers: processes that decode; 0 decodes in this one. engine: "local", or "ray", where each of `workers`
    actors (0: as many as this machine has cores) reads the source and makes a share of the missing parts.
    split: of a dataset on the hub.
    """

    format: str = "auto"
    images: Path | None = None
    columns: dict[str, str] = field(default_factory=dict)
    rows_per_file: int = ROWS_PER_FILE
    shard: tuple[int, int] = (0, 1)
    keep_ties: bool = False
    max_bad_share: float = 1.0
    workers: int = 0
    engine: str = "local"
    split: str = ""


def convert(
    source: str, out: Path, options: ConvertOptions | None = None, text: TextIO | None = None
) -> dict[str, Any] | None:
    """Convert `source` into the folder `out`, print the report and return it; None while parts of other
    shards are missing.

    Raises UserError: nothing there, a source that does not fit its format or is damaged, an output folder
    of something else, more bad rows than allowed, no usable pair, a full disk.
    """
    options = options or ConvertOptions()
    _check_options(options)
    name, opened = open_source(options.format, _request(source, options))
    key = _key(name, opened, options)
    with told_when_disk_is_full(
        f"the pairs {out}", "what is finished of them stays and will be used", hint=""
    ):
        claim(out, key, "conversion", _name_of)
        report = finished_report(out, "convert")
        finished = report is not None
        if report is None:
            if options.engine == "ray":
                _make_with_ray(source, out, options)
            total = _make_missing(out, opened, options)
            parts = [part_path(out, n) for n in range(-(-total // options.rows_per_file))]
            missing = [part for part in parts if not part.exists()]
            if missing:
                print(f"this shard is done; {len(missing)} parts of others are missing", file=sys.stderr)
                return None
            report = build_report(parts)
            atomic_write_text(out / REPORT, json.dumps(report, indent=2) + "\n")
        print(table(report), file=text or sys.stdout)
        _check_report(report, source, options)
        if not finished:
            write_manifest(out, key, ("pillow", "pyarrow"))
    return report


def _check_options(options: ConvertOptions) -> None:
    if options.format != "auto" and options.format not in SOURCES:
        raise UserError(f"unknown format {options.format!r}", fix=f"formats: auto, {', '.join(SOURCES)}")
    require_shard(options.shard)
    require_engine(options.engine)
    if options.rows_per_file < 1 or options.workers < 0:
        raise UserError("--rows-per-file must be at least 1, and --workers at least 0")
    if not 0.0 <= options.max_bad_share <= 1.0:
        raise UserError(f"--max-bad-share must lie in 0..1, got {options.max_bad_share:g}")
    if options.images is not None and not options.images.is_dir():
        raise UserError(f"--images {options.images} is no folder")


def _request(source: str, options: ConvertOptions) -> Request:
    place = resolve(source)
    if isinstance(place, str) and not set(place) & set("*?["):
        place = resolve_or_hub_id(source, "source")
        if isinstance(place, str):
            place = hub.fetch(place, options.split or "train")
            return Request(place, options.images, options.columns)
    if options.split:
        raise UserError(
            "--split has no effect on local files", fix="name the files, such as 'train*.parquet'"
        )
    return Request(place, options.images, options.columns)


def _key(name: str, source: Source, options: ConvertOptions) -> dict[str, Any]:
    """What decides every byte of the output, but the versions of libraries."""
    images = None if options.images is None else str(options.images.resolve())
    return {
        "converter": FORMAT, "format": name, "files": describe_files(source.files),
        "source": dict(source.key), "images": images,
        "rows_per_file": options.rows_per_file, "keep_ties": options.keep_ties,
    }  # fmt: skip


def _name_of(setting: str) -> str:
    """How a setting that differs is called."""
    return {
        "converter": "another version of diffpref", "files": "files of other contents",
        "source": "other names or columns in the source", "rows_per_file": "another --rows-per-file",
        "keep_ties": "the other --keep-ties",
    }.get(setting, f"another --{setting}")  # fmt: skip


def _check_report(report: dict[str, Any], source: str, options: ConvertOptions) -> None:
    """Raise UserError for too many bad rows and for no pair at all."""
    first = next((f"{bad['row']}: {bad['detail']}" for bad in report["bad_rows"]), "")
    if report["bad"] > options.max_bad_share * report["rows"]:
        raise UserError(
            f"{report['bad']:,} of {report['rows']:,} rows of {source} are bad, more than the share allowed "
            f"(--max-bad-share {options.max_bad_share:g})",
            why=first,
            fix="see the rows named above; the same command with a larger share accepts what was converted",
        )
    if report["kept"] == 0:
        why = first or ("all are ties" if report["rows"] else "it has no rows")
        raise UserError(f"no usable pair in {source}", why, "see the rows named above")


def _make_missing(out: Path, source: Source, options: ConvertOptions) -> int:
    """Make the missing parts of this shard here; returns the rows of the whole source, which are counted."""
    with tqdm(total=source.rows, desc="convert", unit="row", file=sys.stderr, disable=None) as bar:
        parts = _Parts(out, source, options, bar.update)
        for _ in parts.build():
            pass
    return parts.total


def _make_with_ray(source: str, out: Path, options: ConvertOptions) -> None:
    workers = options.workers or os.cpu_count() or 1
    place = resolve(source)
    is_local = isinstance(place, Path) or set(place) & set("*?[")
    images = None if options.images is None else options.images.resolve()
    job = ConvertJob(
        os.path.abspath(place) if is_local else source,
        out.resolve(),
        replace(options, images=images, workers=0, engine="local"),
        workers,
    )
    with tqdm(desc="convert", unit="row", file=sys.stderr, disable=None) as bar:
        run_units(job, range(workers), bar.update, Engine("ray", workers))


@dataclass(frozen=True)
class ConvertJob:
    """The missing parts of a shard in `shares` shares, each of which one worker makes: unit n is the n-th."""

    source: str
    out: Path
    options: ConvertOptions
    shares: int

    def start(self, device: str) -> Worker:
        """Open the source once."""
        del device
        _, source = open_source(self.options.format, _request(self.source, self.options))
        index, count = self.options.shard

        def make(unit: int) -> Iterator[int]:
            share = replace(self.options, shard=(index + count * unit, count * self.shares))
            return _Parts(self.out, source, share, lambda rows: None).build()

        return make


class _Parts:
    """The loop over the source that makes the missing parts of this shard."""

    def __init__(
        self, out: Path, source: Source, options: ConvertOptions, passed: Callable[[int], object]
    ) -> None:
        """passed(n): called for n more rows of the source, whether they are wanted or not."""
        self._passed = passed
        self._out, self._source, self._options = out, source, options
        self._missing: dict[int, bool] = {}
        self._under_way: deque[int] = deque()  # part of each candidate that is being judged, in order
        self.total = 0
        """Rows that the source has given; all of it when `build` has ended."""

    def build(self) -> Iterator[int]:
        """Make them; yields the rows of each that is finished."""
        schema = part_schema(self._source)
        judged = judge_all(self._candidates(), self._options.keep_ties, self._options.workers)
        for number, rows in itertools.groupby(judged, lambda _: self._under_way.popleft()):
            await_writer(part_path(self._out, number))
            with staged(part_path(self._out, number)) as stream, PartWriter(stream, schema) as writer:
                for row in rows:
                    writer.add(row)
            yield writer.tally.read

    def _candidates(self) -> Iterator[Candidate]:
        """Those of missing parts. The others are counted: only the end of the source tells how many parts
        there are."""
        for item in self._source.read(self._wanted):
            number = self.total
            self.total += item if isinstance(item, int) else 1
            self._passed(self.total - number)
            if not isinstance(item, int) and self._wanted(number, number + 1):
                self._under_way.append(number // self._options.rows_per_file)
                yield item

    def _wanted(self, first: int, stop: int) -> bool:
        rows = self._options.rows_per_file
        return any(self._is_missing(part) for part in range(first // rows, (stop - 1) // rows + 1))

    def _is_missing(self, part: int) -> bool:
        index, count = self._options.shard
        if part not in self._missing:
            self._missing[part] = part % count == index and not part_path(self._out, part).exists()
        return self._missing[part]
