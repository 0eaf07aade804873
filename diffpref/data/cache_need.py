"""The disk that a cache takes, before anything is encoded, and whether it is there."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffpref.config import DataConfig
from diffpref.data.buckets import Size
from diffpref.data.cache_parts import Latents, Part
from diffpref.data.encoding import STORED, buckets_of
from diffpref.errors import UserError

HEADER = 1024
"""Bytes of a file beside its tensors, about."""
PLACES = 136
"""Bytes beside the latents of a pair: id, numbers, sizes and crops."""
SAMPLED_GROUPS, SAMPLED_PAIRS = 32, 256


@dataclass(frozen=True)
class Need:
    """Bytes of one part of a cache. `likely` lies between `least` and `most`, which differ with buckets only.

    there: bytes of its files that are made already.
    """

    what: str
    detail: str
    files: int
    least: int
    likely: int
    most: int
    there: int


def needs(parts: Sequence[Part]) -> list[Need]:
    """What each part that is not finished takes. Reads headers of some images where there are buckets."""
    return [_latents(p) if isinstance(p, Latents) else _text(p) for p in parts if not p.finished()]


def describe(found: Sequence[Need], folder: Path) -> str:
    """The needs as lines of text, with their sum and the room there is."""
    lines = [(need.what, in_units(need.likely), f"{need.files:,} files: {need.detail}") for need in found]
    there = sum(need.there for need in found)
    most = sum(need.most for need in found)
    likely = sum(need.likely for need in found)
    notes = [f"at most {in_units(most)}"] if most > likely else []
    notes += [f"of which {in_units(there)} are there"] if there else []
    free = _free(folder)
    notes += [f"{in_units(free)} are free"] if free is not None else []
    lines.append(("all", in_units(likely), ", ".join(notes)))
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    table = "\n".join(f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in lines)
    return f"the cache {folder} takes\n{table}"


def check_room(found: Sequence[Need], folder: Path) -> None:
    """Raise UserError when even the least of what is missing does not fit."""
    wanted, free = sum(need.least - need.there for need in found), _free(folder)
    if free is None or wanted <= free:
        return
    raise UserError(
        f"the cache {folder} does not fit on its disk",
        why=f"{in_units(wanted)} are still to be written, and {in_units(free)} are free",
        fix="free some space, name a folder on another disk in data.cache_dir, or set "
        'data.latent_precision = "fp16", which halves the latents, or data.cache_latents = false',
    )


def in_units(count: int) -> str:
    """Bytes for people: "223.2 GB" is 223.2 times 10**9."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


def _latents(part: Part) -> Need:
    sizes = _sizes(part)
    each = {size: _bytes_of_pair(part, size) for size in buckets_of(part.data, part.family).sizes}
    pairs, sampled = len(part.table), sizes.total()
    likely = sum(each[size] * count for size, count in sizes.items()) / sampled
    if len(each) == 1:
        detail = f"{pairs:,} pairs of {likely:,.0f} bytes at {_by(*each)}"
    else:
        shares = [f"{_by(size)} {count / sampled:.0%}" for size, count in sizes.most_common(4)]
        detail = f"{pairs:,} pairs; of {sampled} looked at, {', '.join(shares)}"
    rest = HEADER * len(part.tasks)
    least, most = (pairs * limit + rest for limit in (min(each.values()), max(each.values())))
    return Need("latents", detail, len(part.tasks), least, int(pairs * likely) + rest, most, _there(part))


def _text(part: Part) -> Need:
    each = sum(tensor.numel() * tensor.element_size() for tensor in part.family.encode_prompts([""]).values())
    captions = sum(task.size for task in part.tasks)
    total = captions * each + HEADER * len(part.tasks) + 16 * len(part.table)
    detail = f"{captions:,} captions of {each:,} bytes"
    return Need(part.folder.name, detail, len(part.tasks) + 1, total, total, total, _there(part))


def _sizes(part: Part) -> Counter[Size]:
    """How many pairs of a sample are trained at which size: some of each of some row groups."""
    table, buckets = part.table, buckets_of(part.data, part.family)
    if len(buckets.sizes) == 1:
        return Counter({buckets.sizes[0]: 1})
    starts = table.group_starts()
    starts = starts[:: math.ceil(len(starts) / SAMPLED_GROUPS)]
    each = SAMPLED_PAIRS // len(starts)
    wanted = {index for start in starts for index in range(start, start + each)}
    found: Counter[Size] = Counter()
    for index in sorted(index for index in wanted if index < len(table)):
        sizes = table.image_sizes(index)
        if sizes is not None:
            found[buckets.choose(*sizes)] += 1
    return found or Counter({buckets.choose((1, 1), (1, 1)): 1})


def _bytes_of_pair(part: Part, size: Size) -> int:
    return bytes_of_pair(part.data, part.family.codec.latent_shape(*size))


def bytes_of_pair(data: DataConfig, latent: tuple[int, int, int]) -> int:
    """What the latents of a pair take in the cache: mean and log-variance [C, h, w] of two images, and of
    their mirror images where pairs are flipped."""
    variants = 2 if data.flip != "none" else 1
    return 2 * 2 * variants * math.prod(latent) * STORED[data.latent_precision].itemsize + PLACES


def _there(part: Part) -> int:
    return sum(path.stat().st_size for path in part.folder.glob("*.safetensors"))


def _free(folder: Path) -> int | None:
    """None where the file system does not tell."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
