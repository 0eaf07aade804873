"""`diffpref caption`: a caption for each image of every pair, in Parquet parts beside all source columns.

    OUT/settings.json       written first: what is captioned and how; another run is refused there
    OUT/part-00000.parquet  the rows kept of the first `rows_per_file` rows, with their tally in the footer
    OUT/report.json         the counts of all parts
    OUT/captions-report.*   a sample sheet and statistics to look at, and the same as JSON
    OUT/manifest.json       written last: the folder is complete
    OUT/journal/            answers of HTTP endpoints, none of which is asked for twice

Part n holds what is kept of the rows n * rows_per_file and following. Beside an unfinished part lie the
captions that were made for it (`.part-00003.captions.jsonl`), so that a run that was killed at any moment
goes on there, repeats at most one batch a worker, and ends in the same bytes.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from diffpref.captions.backends import backend_key, wants_device, with_journal
from diffpref.captions.base import Captioner, Perturber
from diffpref.captions.making import CaptionJob
from diffpref.captions.progress import progress_path, read_progress
from diffpref.captions.source import PairSource, open_source
from diffpref.captions.stages import METHODS, Method, added_columns
from diffpref.captions.summary import build_report, table
from diffpref.data.disk import told_when_disk_is_full, told_when_refused
from diffpref.data.outfolder import REPORT, claim, describe_files, finished_report, write_manifest
from diffpref.data.parts import part_path
from diffpref.data.schema import Columns, PickAPicColumns
from diffpref.engine import Engine, require_shard, run_units
from diffpref.engine.meter import Meter
from diffpref.errors import UserError
from diffpref.paths import TINY_PREFIX, atomic_write_text

log = logging.getLogger("diffpref")
FORMAT = 1
PAGE = "captions-report.html"
ROWS_PER_FILE = 1000
BATCH = 16
_TOLD_ONLY = ("pairs", "tokenizer")  # in settings.json for people; what they name has a hash there as well


@dataclass(frozen=True)
class CaptionOptions:
    """How to caption.

    captioner, perturber: those that the method takes, None for the other. tokenizer: folder or hub id of the
    text encoder's tokenizer or pipeline; "" is that of the small model for its own pairs, else none.
    batch: pairs that the backends get at a time. limit: only the first so many rows; 0: all.
    rows_per_file: source rows that one part covers. shard: (i, n): make every n-th part from part i on.
    replace: put new captions in the place of those that the pairs have. max_failed_share: share of the rows
    (0..1) that may be left out.
    """

    method: Method
    captioner: Captioner | None = None
    perturber: Perturber | None = None
    tokenizer: str = ""
    columns: Columns = field(default_factory=PickAPicColumns)
    batch: int = BATCH
    rows_per_file: int = ROWS_PER_FILE
    shard: tuple[int, int] = (0, 1)
    limit: int = 0
    replace: bool = False
    max_failed_share: float = 0.01
    engine: Engine = field(default_factory=Engine)


def caption(
    pairs: str, out: Path, options: CaptionOptions, text: TextIO | None = None
) -> dict[str, Any] | None:
    """Caption `pairs` into the folder `out`, print the report and return it; None while parts of other
    shards are missing.

    Raises UserError: no pairs there or damaged ones, captions already there, an output folder of something
    else, a backend that cannot work, more rows that failed than allowed, a full disk, a file that the system
    refuses.
    """
    _check_options(options)
    source = open_source(pairs, options.columns, options.limit)
    _check_columns(source, options)
    out = out.expanduser().resolve()
    job = _job(pairs, source, out, options)
    key = _key(pairs, job, options)
    kept = "what is finished of them stays and will be used"
    with (
        told_when_disk_is_full(f"the captions {out}", kept, hint=""),
        told_when_refused(f"the captions {out}", kept),
    ):
        claim(out, key, "caption run", _name_of)
        report = finished_report(out, "caption")
        finished = report is not None
        if report is None:
            run = _make_missing(job, options)
            missing = [part for part in job.parts() if not part.exists()]
            if missing:
                print(f"this shard is done; {len(missing)} parts of others are missing", file=sys.stderr)
                return None
            _remove_leftovers(out)
            report = build_report(job.parts(), job.token_limit) | {"run": run}
            atomic_write_text(out / REPORT, json.dumps(report, indent=2) + "\n")
        print(table(report), file=text or sys.stdout)
        _check_report(report, pairs, options)
        if not finished:
            _write_page(out, job)
            write_manifest(out, key, ("pillow", "pyarrow"))
    return report


def _check_options(options: CaptionOptions) -> None:
    if options.method not in METHODS:
        raise UserError(f"unknown method {options.method!r}", fix=f"methods: {', '.join(METHODS)}")
    wanted = {"captioner": options.method != "perturbation", "perturber": options.method != "captioning"}
    for kind, is_wanted in wanted.items():
        if is_wanted == (getattr(options, kind) is None):
            raise UserError(
                f"--method {options.method} {'needs' if is_wanted else 'takes no'} --{kind}",
                fix=f"{'give' if is_wanted else 'leave out'} --{kind}",
            )
    require_shard(options.shard)
    if options.rows_per_file < 1 or options.batch < 1 or options.limit < 0:
        raise UserError("--rows-per-file and --batch must be at least 1, and --limit at least 0")
    if not 0.0 <= options.max_failed_share <= 1.0:
        raise UserError(f"--max-failed-share must lie in 0..1, got {options.max_failed_share:g}")


def _check_columns(source: PairSource, options: CaptionOptions) -> None:
    """Raise UserError when new columns would take the place of old ones that are needed, or are there yet."""
    columns, added = options.columns, list(added_columns(options.columns))
    read = (columns.caption, columns.image_0, columns.image_1, columns.label_0)
    wanted = len(read) + len(added_columns(PickAPicColumns()))
    if "" in added or len({*added, *read}) < wanted:
        raise UserError(
            "two columns have the same name, or one has none",
            why=f"read: {', '.join(read)}; written: {', '.join(added)}",
            fix="choose other --columns.caption_0 and --columns.caption_1",
        )
    there = [name for name in added if name in source.schema.names]
    if there and not options.replace:
        raise UserError(
            f"{source.files[0].path} has {', '.join(there)} already",
            fix="give --replace to write new ones in their place (the source stays as it is)",
        )
    if options.replace and not there:
        log.warning("--replace has no effect: the pairs have none of %s", ", ".join(added))


def _job(pairs: str, source: PairSource, out: Path, options: CaptionOptions) -> CaptionJob:
    journal = out / "journal"
    captioner, perturber = with_journal(options.captioner, journal), with_journal(options.perturber, journal)
    return CaptionJob(
        source=source,
        out=out,
        columns=options.columns,
        method=options.method,
        captioner=captioner,
        perturber=perturber,
        tokenizer=options.tokenizer or ("tiny:model" if pairs.startswith(TINY_PREFIX) else ""),
        replace=options.replace,
        batch=options.batch,
        rows_per_file=options.rows_per_file,
        most_failed=int(options.max_failed_share * source.rows),
    )


def _key(pairs: str, job: CaptionJob, options: CaptionOptions) -> dict[str, Any]:
    """What decides every byte of the parts, but the versions of libraries."""
    paths = {f"{n}/{file.path.name}": file.path for n, file in enumerate(job.source.files)}
    return {
        "writer": FORMAT,
        "pairs": pairs,
        "files": describe_files(paths),
        "limit": options.limit,
        "columns": {name: getattr(options.columns, name) for name in asdict(PickAPicColumns())},
        "method": options.method,
        **backend_key("captioner", options.captioner),
        **backend_key("perturber", options.perturber),
        "tokenizer": job.tokenizer,
        "tokenizer_hash": job.tokenizer_hash(),
        "rows_per_file": options.rows_per_file,
        "replace": options.replace,
    }


def _name_of(setting: str) -> str:
    """How a setting that differs is called; "" for one that may."""
    if setting in _TOLD_ONLY:
        return ""
    return {
        "writer": "another version of diffpref", "files": "files of other contents",
        "columns": "other --columns", "tokenizer_hash": "another --tokenizer",
        "replace": "the other --replace",
    }.get(setting, f"another --{setting.replace('_', '-')}")  # fmt: skip


def _make_missing(job: CaptionJob, options: CaptionOptions) -> dict[str, Any]:
    """Make the missing parts of this shard; returns what this run did."""
    index, count = options.shard
    mine = range(index, job.count, count)
    missing = [number for number in mine if not part_path(job.out, number).exists()]
    if missing:
        job.source.check_labels(options.columns)
    total = sum(len(job.rows(number)) for number in mine)
    kept = sum(len(read_progress(progress_path(part_path(job.out, number)))) for number in missing)
    done = total - sum(len(job.rows(number)) for number in missing) + kept
    backends = (options.captioner, options.perturber)
    engine = Engine(options.engine.name, options.engine.workers, any(map(wants_device, backends)))
    with Meter("caption", total, done) as meter:
        run_units(job, missing, meter.add, engine)
    seconds = round(meter.seconds, 3)
    rate = 2 * meter.new / seconds if seconds else 0.0
    return {"captions": 2 * meter.new, "seconds": seconds, "captions_per_second": round(rate, 3)}


def _write_page(out: Path, job: CaptionJob) -> None:
    from diffpref.captions.report import write_captions_report  # takes seconds to import

    write_captions_report(out, out / PAGE, tokenizer=job.tokenizer, columns=job.columns)


def _remove_leftovers(out: Path) -> None:
    """What a kill between the end of a part and the end of its progress left behind."""
    for pattern in (".part-*.captions.jsonl", ".part-*.parquet.tmp"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def _check_report(report: dict[str, Any], pairs: str, options: CaptionOptions) -> None:
    """Raise UserError for too many rows that failed, and for no row at all."""
    first = next((f"{bad['row']}: {bad['detail']}" for bad in report["bad_rows"]), "")
    if report["failed"] > options.max_failed_share * report["rows"]:
        raise UserError(
            f"{report['failed']:,} of {report['rows']:,} rows of {pairs} got no captions, more than "
            f"allowed (--max-failed-share {options.max_failed_share:g})",
            why=first,
            fix="see the rows named above; the same command with a larger share accepts what was captioned",
        )
    if report["kept"] == 0:
        raise UserError(f"no row of {pairs} got captions", first, "see the rows named above")
