"""`diffpref encode`: the latent and text cache alone, by one process or many, on one machine or several."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffpref.config import TrainConfig
from diffpref.data.cache import finish, full_disk_is_told, open_cache, prepare, progress_bar
from diffpref.data.cache_need import check_room, describe, needs
from diffpref.data.disk import told_when_refused
from diffpref.data.encoding import Encoder, Task
from diffpref.data.pairs import PairTable
from diffpref.engine import Engine, Worker, require_engine, require_shard, run_units
from diffpref.errors import UserError
from diffpref.families import Family, find_model
from diffpref.paths import shown
from diffpref.processes import Processes, best_device, choose_device, cpu_is_wanted, place_in_launch
from diffpref.training.run import cache_folder, open_tables, report_cache
from diffpref.training.setup import check_model, set_numerics
from diffpref.training.stop import Stopped, StopRequest

log = logging.getLogger("diffpref")


@dataclass(frozen=True)
class EncodeOptions:
    """How to encode. shard: (i, n): make every n-th file, from file i on. engine, workers: who makes them, as
    in `Engine`."""

    shard: tuple[int, int] = (0, 1)
    engine: str = "local"
    workers: int = 0


def encode(config: TrainConfig, options: EncodeOptions | None = None) -> Path:
    """Build the latent and text cache of `config` without training; returns the cache folder.

    Prints the disk it takes before anything is encoded. Under accelerate launch or torchrun each process
    takes a part of the shard. Whoever makes the last missing file writes the manifests.

    Raises UserError: a mistake in config, model or data, a cache of something else in data.cache_dir, a disk
    that is too small, a damaged file, too many bad rows.
    """
    folder = cache_folder(config)
    with told_when_refused(f"the cache {shown(folder)}", "what is finished of it stays and will be used"):
        return _encode(config, options or EncodeOptions(), folder)


def _encode(config: TrainConfig, options: EncodeOptions, folder: Path) -> Path:
    place = place_in_launch()
    first, step = _share(options, place)
    named = bool(config.data.cache_dir)
    set_numerics(config)
    tables = open_tables(config, first == 0)
    family = _load(config)
    parts = {name: prepare(t, family, config.data, folder / name, named) for name, t in tables.items()}
    found = [replace(n, what=f"{name} {n.what}") for name in parts for n in needs(parts[name])]
    if found and first == 0:
        print(describe(found, folder), flush=True)
    check_room(found, folder)
    tasks = [(name, t) for name in parts for part in parts[name] for t in part.missing(first, step)]
    job = EncodeJob(config, tables, tasks, os.getcwd(), _threads(config, options), _encoders(family), family)
    try:
        with full_disk_is_told(folder):
            _run(job, options, place.world == 1, first == 0)
            missing = sum(finish(parts[name], folder / name) for name in parts)
    except Stopped:
        log.info("stopped; the same command continues the cache")
        return folder
    if missing:
        log.info("this shard is done; %d files of others are missing; who ends last completes it", missing)
        return folder
    for name in parts:
        report_cache(name, open_cache(parts[name], folder / name))
    log.info("the cache %s is complete", folder)
    return folder


@dataclass(frozen=True)
class EncodeJob:
    """The files to make, for the engine; unit n is tasks[n], of the table of that name.

    place: the folder that relative paths start at. threads: of torch in each worker, 0 for what it takes.
    encoders: hashes of the model's. family: the model, where it is loaded; it does not travel.
    """

    config: TrainConfig
    tables: dict[str, PairTable]
    tasks: list[tuple[str, Task]]
    place: str
    threads: int
    encoders: tuple[str, str]
    family: Family | None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "family": None}

    def start(self, device: str) -> Worker:
        """Load the model and move it to the device. Raises UserError when it is not that of the caller."""
        data, family = self.config.data, self.family
        if family is None:
            family = self._load()
            data = replace(data, workers=0)  # a worker decodes ahead in a thread; more workers decode more
        family.to(torch.device(choose_device(device or None, place_in_launch().local_rank)))
        encoders = {name: Encoder(table, family, data) for name, table in self.tables.items()}

        def worker(unit: int) -> Iterator[int]:
            name, task = self.tasks[unit]
            return encoders[name].make(task)

        return worker

    def _load(self) -> Family:
        os.chdir(self.place)
        set_numerics(self.config)
        if self.threads:
            torch.set_num_threads(self.threads)
        family = _load(self.config)
        if _encoders(family) != self.encoders:
            raise UserError(
                f"model.base = {self.config.model.base!r} is another model for a worker than for the command",
                fix="give a folder that all machines share, or model.revision with a hub id",
            )
        return family


def _run(job: EncodeJob, options: EncodeOptions, alone: bool, shown: bool) -> None:
    """Make the files. A local run stops at a signal, between two batches; Ray answers signals itself."""
    engine = Engine(options.engine, options.workers, on_device=alone and not cpu_is_wanted())
    several = engine.workers > 0 or engine.name == "ray"
    if several and job.config.data.workers and job.config.data.cache_latents:
        log.warning("data.workers has no effect: each of several processes decodes by itself")
    total = sum(task.size for _, task in job.tasks)
    with (
        StopRequest() if engine.name == "local" else contextlib.nullcontext() as stop,
        progress_bar("images and captions", "item", total, shown) as bar,
    ):

        def progress(done: int) -> None:
            bar.update(done)
            if stop:
                stop.check()

        run_units(job, range(len(job.tasks)), progress, engine)


def _load(config: TrainConfig) -> Family:
    """The model, its UNet without weights: it takes no part, and many workers would hold it."""
    family = find_model(config.model).load()
    check_model(config, family)
    family.fingerprint()  # of the weights, while they are there
    family.unet.to("meta")
    return family


def _encoders(family: Family) -> tuple[str, str]:
    hashes = family.fingerprint()
    return hashes["vae"], hashes["text"]


def _share(options: EncodeOptions, place: Processes) -> tuple[int, int]:
    """(first, step): this process makes every step-th file from number `first` on, with those of a launch."""
    index, count = options.shard
    require_shard(options.shard)
    require_engine(options.engine)  # before a model is loaded
    if place.world > 1 and (options.workers or options.engine != "local"):
        raise UserError(
            "--workers and --engine ray do not go with accelerate launch or torchrun",
            why=f"{place.world} processes were launched already",
            fix="leave out the one or the other",
        )
    return index * place.world + place.rank, count * place.world


def _threads(config: TrainConfig, options: EncodeOptions) -> int:
    """Threads of each local worker, unless train.threads says it: together no more than this process would
    take. Ray sets its own."""
    if config.train.threads or options.engine != "local" or options.workers < 2 or best_device() != "cpu":
        return 0
    return max(1, torch.get_num_threads() // options.workers)
