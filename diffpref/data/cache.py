"""The latent and text cache: what the VAE and the text encoder make of the pairs, computed once.

    FOLDER/latents/00000.safetensors     256 pairs a file: posterior mean and log-variance of both images, by
                                         size (mean/512x512), mirrored ones too where data.flip wants them
    FOLDER/text-shared/00000.safetensors embeddings, once per caption; text-dual beside it for dual captions
    FOLDER/*/manifest.json               written last, with the size and SHA-256 of each file: a part without
                                         it is unfinished and is continued

Each part has a key: a hash of the pair files, the encoder's weights and the settings that shape it. Files are
whole or absent and depend on the pairs alone, so a build that was killed at any moment, or done by many
processes, gives the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from diffpref.config import DataConfig
from diffpref.data.cache_need import check_room, needs
from diffpref.data.cache_parts import Latents, Part, Text, read_header, read_manifest, remove
from diffpref.data.cached import EncodedPairs, LatentCache, TextCache
from diffpref.data.disk import told_when_disk_is_full, told_when_not_writable
from diffpref.data.encoding import Encoder
from diffpref.data.live import LiveLatents
from diffpref.data.pairs import PairTable
from diffpref.errors import UserError
from diffpref.families.base import Family
from diffpref.paths import atomic_write_text, fingerprint, sha256_file

log = logging.getLogger("diffpref")


@dataclass(frozen=True)
class Share:
    """This process's part of the work. `wait` returns when every process has called it; `check` may stop the
    build."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None


def build_cache(
    table: PairTable, family: Family, data: DataConfig, folder: Path, named: bool, share: Share | None = None
) -> EncodedPairs:
    """Encode what is missing of `table` into `folder` and open it; without data.cache_latents the captions
    only.

    named: the user chose the folder: a cache of other pairs, another model or other settings in it is an
    error; otherwise the folder is ours and such a cache is made anew. Pairs with undecodable or identical
    images are left out and named in the manifest.

    Raises UserError: a cache made for something else (when named), a damaged file, too many bad rows, no
    usable pair, disk full.
    """
    share = share or Share()
    alone = locked_build(folder, share.check) if share.rank == 0 else contextlib.nullcontext()
    with alone, full_disk_is_told(folder), Encoder(table, family, data) as encoder:
        if share.rank == 0:
            parts = prepare(table, family, data, folder, named)
            check_room(needs(parts), folder)
        share.wait()
        if share.rank != 0:
            parts = prepare(table, family, data, folder, named)
        for part in parts:
            missing = part.missing(share.rank, share.world)
            with progress_bar(part.what, part.unit, sum(t.size for t in missing), share.rank == 0) as bar:
                for task in missing:
                    share.check()
                    for done in encoder.make(task):
                        bar.update(done)
        share.wait()
        if share.rank == 0:
            finish(parts, folder)
    share.wait()
    return open_cache(parts, folder)


def prepare(table: PairTable, family: Family, data: DataConfig, folder: Path, named: bool) -> list[Part]:
    """The parts of the cache, in a folder that holds nothing of another one. Raises UserError when the user
    named one that does."""
    with locked(folder):
        remove(folder, ".files.json.*.tmp")
        pairs = _pairs_key(table, folder)
        kinds: list[tuple[str, type[Part]]] = [("latents", Latents)] if data.cache_latents else []
        kinds += [(f"text-{data.captions}", Text)]
        parts = [kind(table, family, data, folder / name, pairs) for name, kind in kinds]
        for part in parts:
            _clear_if_other(part, named)
            with told_when_not_writable(part.folder):
                part.folder.mkdir(parents=True, exist_ok=True)
    return parts


def finish(parts: Sequence[Part], folder: Path) -> int:
    """Write the manifests of parts that have all their files; the number of files that others have yet to
    make."""
    with locked(folder):
        return sum(part.finish() for part in parts)


def open_cache(parts: Sequence[Part], folder: Path) -> EncodedPairs:
    """A cache of which all parts are finished. Raises UserError when a file is missing or cut off."""
    text = TextCache(parts[-1].folder)
    if len(parts) == 2:
        return EncodedPairs(LatentCache(parts[0].folder), text)
    table, resolution = parts[-1].table, parts[-1].data.resolution
    pairs = fingerprint(_pairs_key(table, folder))
    return EncodedPairs(LiveLatents(table, parts[-1].family.codec, resolution, pairs), text)


def full_disk_is_told(folder: Path) -> contextlib.AbstractContextManager[None]:
    return told_when_disk_is_full(f"the cache {folder}", "what is finished of it stays and will be used")


def progress_bar(what: str, unit: str, total: int, shown: bool = True) -> tqdm[Any]:
    hidden = not shown or total == 0
    return tqdm(total=total, unit=unit, desc=f"encode {what}", disable=hidden, file=sys.stderr, leave=False)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes that begin or finish the same cache."""
    with told_when_not_writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # a cache that may be read only, a file system without locks
            fcntl.flock(held.enter_context(open(folder / ".lock", "ab")), fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def locked_build(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Hold the folder for a whole build: another run that begins the same cache waits, and finds it finished.

    check: may stop the wait.
    """
    with told_when_not_writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # as in `locked`
            lock = held.enter_context(open(folder / ".build", "ab"))
            told = False
            while not _try_lock(lock):
                if not told:
                    log.info("another run encodes into %s: waiting for it", folder)
                    told = True
                check()
                time.sleep(0.2)
        yield


def _try_lock(stream: BinaryIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _clear_if_other(part: Part, named: bool) -> None:
    found = _found_key(part.folder)
    if found is None or found == part.key_hash:
        return
    if named:
        raise UserError(
            f"{part.folder.parent} holds a cache that was made for something else",
            why=_difference(part),
            fix="choose another data.cache_dir, remove this one, or leave data.cache_dir empty",
        )
    shutil.rmtree(part.folder)


def _found_key(folder: Path) -> str | None:
    """Key of what is in the folder, finished or not; None when nothing readable is there."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return str(manifest["key_hash"])
    found = None
    for path in sorted(folder.glob("*.safetensors")):
        try:
            return str(read_header(path)[1]["key"])
        except (UserError, KeyError):
            found = ""
    return found


def _difference(part: Part) -> str:
    manifest = read_manifest(part.folder)
    if manifest is None:
        return (
            f"its unfinished {part.what} are of other pairs, another model, settings or version of diffpref"
        )
    found = manifest["key"]
    names = {
        "vae": "another model's VAE", "text": "another model's text encoder", "pairs": "other pairs",
        "rows": "other rows of the pairs", "columns": "other columns", "captions": "other captions",
        "resolution": f"data.resolution {found.get('resolution')}", "aspect": "another data.aspect",
        "mirrored": "another data.flip", "precision": "another model.vae_precision",
        "stored": "another data.latent_precision",
    }  # fmt: skip
    differing = [text for name, text in names.items() if found.get(name) != part.key.get(name)]
    return f"its {part.what} were made with {' and '.join(differing) or 'another version of diffpref'}"


def _pairs_key(table: PairTable, folder: Path) -> dict[str, Any]:
    """What identifies the pairs: file contents, the rows in use, and the columns they come from."""
    columns = table.columns
    return {
        "pairs": _file_hashes(table.files, folder),
        "rows": fingerprint(table.pair_ids()),
        "columns": [columns.image_0, columns.image_1, columns.label_0],
    }


def _file_hashes(files: tuple[Path, ...], folder: Path) -> list[str]:
    """sha256 of each file. Remembered in FOLDER/files.json by size and time, since pair sets can be 300
    GB."""
    memory = folder / "files.json"
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    entries = {}
    for path in files:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        old = known.get(str(path.resolve()))
        entries[str(path.resolve())] = old if old and old[:2] == stamp else [*stamp, sha256_file(path)]
    if any(known.get(path) != entry for path, entry in entries.items()):
        with contextlib.suppress(PermissionError):  # a memory only, of a cache that may be read only
            atomic_write_text(memory, json.dumps({**known, **entries}, indent=2) + "\n")
    return [str(entries[str(path.resolve())][2]) for path in files]
