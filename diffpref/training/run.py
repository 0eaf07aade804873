"""`diffpref train`: from a config to a run folder."""

from __future__ import annotations

import itertools
import logging
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn

from diffpref import environment
from diffpref.config import TrainConfig, to_dict
from diffpref.data.cache import Share, build_cache
from diffpref.data.cached import EncodedPairs
from diffpref.data.disk import told_when_disk_is_full, told_when_refused
from diffpref.data.pairs import PairTable, open_pairs
from diffpref.errors import UserError
from diffpref.families import Family, find_model
from diffpref.families.loading import unet_skeleton
from diffpref.objectives import OBJECTIVES
from diffpref.paths import home_path, shown
from diffpref.training.checkpoint import Checkpoint
from diffpref.training.export import export_model
from diffpref.training.hub import check_hub, push
from diffpref.training.policy import check_targets, prepare_unet
from diffpref.training.runfolder import RunFolder
from diffpref.training.setup import check_grids, check_model, make_launch
from diffpref.training.stop import Stopped, StopRequest
from diffpref.training.tracking import Metrics, peak_memory_gb
from diffpref.training.trainer import Trainer

log = logging.getLogger("diffpref")


def train(config: TrainConfig) -> Path:
    """Train, or continue, the run of `config`; returns the run folder.

    Leaves config.toml, manifest.json, metrics.jsonl, samples/, checkpoints/ and, at the end, model/. On
    SIGTERM or Ctrl-C it saves a checkpoint at the next step and returns; the same command then continues.

    Raises UserError for every mistake in config, model, data or run folder, before anything is written.
    """
    with StopRequest() as stop:
        try:
            return _Session(config, stop).train()
        except Stopped:
            log.info("stopped; the same command continues the run in %s", config.output)
            return Path(config.output)


class _Session:
    """The objects of one command, made in the order in which mistakes are cheapest to find."""

    def __init__(self, config: TrainConfig, stop: StopRequest) -> None:
        self.config, self.stop = config, stop
        check_hub(config.export)
        self.launch = make_launch(config)
        self.accelerator: Accelerator = self.launch.accelerator
        self.folder = RunFolder(config)
        self._begun = False
        self._origin: dict[str, str] = {}

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def train(self) -> Path:
        path, rest = self.folder.path, "it continues from its last checkpoint, if it has one"
        run = f"the run {shown(path)}"
        with told_when_refused(run, rest), told_when_disk_is_full(run, rest):
            try:
                self._run()
            except UserError as error:
                # what is in the cache has cost hours
                kept = isinstance(error.__cause__, OSError | SafetensorError | BrokenExecutor)
                self.folder.close(undo=not (self._begun or kept))
                raise
            finally:
                self.folder.close()
        return path

    def _find_start(self) -> Checkpoint | None:
        """Lock the folder, then look: both by the main process, whose word the others take."""
        found: list[Checkpoint | UserError | None] = [None]
        if self.main:
            try:
                self.folder.open()
                found = [self.folder.find_start(self.accelerator.num_processes)]
            except UserError as error:
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], UserError):
            raise found[0]
        return found[0]

    def _run(self) -> None:
        start = self._find_start()
        if start is not None and self.folder.is_finished(start):
            self._tell_finished(start)
            return
        tables = open_tables(self.config, self.main)
        check_grids(self.config, self._prompts(tables), self.accelerator.device)
        family = self._load()
        inputs = {
            f"model.{name}": value for name, value in family.fingerprint().items()
        }  # before LoRA is added
        if self.config.adapter.type == "dora":  # its magnitudes are norms, taken where they are compared
            family.unet.to(self.accelerator.device)
        prepare_unet(family.unet, self.config)
        caches = self._caches(family, tables)
        inputs |= {f"pairs.{name}": cache.fingerprint for name, cache in caches.items()}
        manifest = self._manifest(inputs, tables, caches)
        if self.main:
            self.folder.begin(manifest, start)
        self._begun = True
        self.accelerator.wait_for_everyone()
        self._train(family, caches, tables, start, manifest)

    def _tell_finished(self, start: Checkpoint) -> None:
        model = self.folder.path / "model"
        log.info("%s is finished: %d steps, model in %s", self.folder.path, start.step, model)
        if self.config.export.push_to_hub and self.main:
            push(model, self.config.export, start.step)

    def _train(
        self,
        family: Family,
        caches: dict[str, EncodedPairs],
        tables: dict[str, PairTable],
        start: Any,
        manifest: dict[str, Any],
    ) -> None:
        config = self.config
        family.release_text()
        if config.data.cache_latents:
            family.codec.release()
        trainer = Trainer(
            config, self.accelerator, family, OBJECTIVES[config.objective.name](**config.objective.params),
            caches, cache_folder(config), manifest["inputs"], self._prompts(tables), self.folder.path, start,
            self.launch.strategy, self.stop,
        )  # fmt: skip
        if start is not None and self.main:
            log.info("continuing %s after step %d", self.folder.path, start.step)
        trainer.train()
        with trainer.exported_weights():
            unet = trainer.distribution.module()  # every process takes part
            if self.main and unet is not None:
                self._export(family, trainer, unet, manifest, len(caches["train"]))
        self.accelerator.wait_for_everyone()

    def _export(
        self, family: Family, trainer: Trainer, unet: nn.Module, manifest: dict[str, Any], pairs: int
    ) -> None:
        config = self.config
        summary: dict[str, Any] = {
            "steps": trainer.step,
            "pairs_per_second": trainer.trained_pairs / trainer.seconds if trainer.seconds else None,
            "peak_memory_gb": peak_memory_gb(self.accelerator.device),
            "micro_batch": trainer.stepper.micro_batch,
            "objective": config.objective.name,
            "pairs": pairs,
            **({"best_step": trainer.early_stop.best_step} if trainer.early_stop else {}),
            **({"metrics": _last_row(trainer.trackers.metrics)} if trainer.trackers else {}),
        }
        model = export_model(self.folder.path, config, family, unet, trainer.step, self._origin, summary)
        self.folder.write_manifest({**manifest, "summary": summary})
        speed = f"{summary['pairs_per_second']:.2f} pairs/s, " if trainer.seconds else ""
        log.info(
            "done: %d steps, %speak memory %.2f GB; model in %s",
            trainer.step, speed, summary["peak_memory_gb"], model,
        )  # fmt: skip
        if config.export.push_to_hub:
            push(model, config.export, trainer.step)

    def _load(self) -> Family:
        """The model, after everything that can be said against it without its weights."""
        files = find_model(self.config.model)
        self._origin = files.origin()
        if self.config.adapter.type != "none":
            check_targets(unet_skeleton(files.folder), self.config.adapter)
        family = files.load()
        check_model(self.config, family)
        family.to(self.accelerator.device)
        return family

    def _caches(self, family: Family, tables: dict[str, PairTable]) -> dict[str, EncodedPairs]:
        accelerator = self.accelerator
        share = Share(
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.wait_for_everyone,
            self._check_stop,
        )
        caches = {}
        for name, table in tables.items():
            folder = cache_folder(self.config) / name
            cache = build_cache(
                table, family, self.config.data, folder, bool(self.config.data.cache_dir), share
            )
            caches[name] = cache
            if self.main:
                report_cache(name, cache)
        return caches

    def _check_stop(self) -> None:
        # Alone, a process can leave at once; among several it would leave the others waiting, so all are
        # killed.
        if self.accelerator.num_processes == 1:
            self.stop.check()

    def _prompts(self, tables: dict[str, PairTable]) -> list[str]:
        """Prompts of the sample grids: those of the config, or the first different captions of the pairs."""
        sampling = self.config.sampling
        if sampling.prompts:
            return list(sampling.prompts)
        captions = (winner for winner, _ in tables.get("validation", tables["train"]).iter_captions())
        return list(dict.fromkeys(itertools.islice(captions, 64 * sampling.count)))[: sampling.count]

    def _manifest(
        self, inputs: dict[str, str], tables: dict[str, PairTable], caches: dict[str, EncodedPairs]
    ) -> dict[str, Any]:
        return {
            "config": to_dict(self.config),
            "inputs": inputs,
            "data": {name: _data_summary(tables[name], cache) for name, cache in caches.items()},
            "versions": environment.versions(),
            "device": str(self.accelerator.device),
            "world_size": self.accelerator.num_processes,
            "strategy": self.launch.strategy,
            "threads": torch.get_num_threads(),
        }


def open_tables(config: TrainConfig, told: bool) -> dict[str, PairTable]:
    """The pairs to train on, and the held-out ones if there are. told: say what they hold."""
    data = config.data
    specs = {"train": data.pairs} | ({"validation": data.validation} if data.validation else {})
    tables = {
        name: open_pairs(
            spec,
            data.columns,
            data.captions,  # type: ignore[arg-type]
            data.max_bad_share,
            data.max_pairs if name == "train" else 0,
        )
        for name, spec in specs.items()
    }
    for name, table in tables.items() if told else ():
        only = f"; the first {len(table)} are used" if table.left_out else ""
        log.info("%s pairs: %s%s", name, table.stats.summary(), only)
    return tables


def _last_row(metrics: Metrics) -> dict[str, Any]:
    """The last row of training, not of a measurement or of grids."""
    return next((row for row in reversed(metrics.rows()) if "loss" in row), {})


def cache_folder(config: TrainConfig) -> Path:
    """Where `encode` and `train` keep latents and embeddings, a folder for each set of pairs."""
    return home_path(config.data.cache_dir or Path(config.output) / "cache")


def _data_summary(table: PairTable, cache: EncodedPairs) -> dict[str, Any]:
    stats, latents = table.stats, cache.manifest
    return {
        "files": [str(path) for path in table.files],
        "rows": stats.rows,
        "pairs": len(cache),
        "ties": stats.ties,
        "unlabelled": stats.unlabelled,
        "identical": latents["identical"],
        "bad_captions": stats.rows - stats.ties - stats.unlabelled - len(table) - table.left_out,
        "left_out": table.left_out,
        "bad_images": latents["bad"],
        "first_bad": latents["first_bad"],
        "captions": cache.text_manifest["count"],
        "truncated_captions": cache.text_manifest["truncated"],
    }


def report_cache(name: str, cache: EncodedPairs) -> None:
    """Say what of the data is not as the user may think it is."""
    latents, text = cache.manifest, cache.text_manifest
    if latents["bad"] or latents["identical"]:
        named = "; ".join(f"{row['row']}: {row['reason']}" for row in latents["first_bad"][:3])
        log.warning(
            "%s pairs: %d left out for bad images, %d for identical ones%s",
            name, latents["bad"], latents["identical"], f" ({named})" if named else "",
        )  # fmt: skip
    if text["truncated"]:
        log.warning(
            "%s pairs: %d of %d captions are longer than %d tokens and were cut",
            name, text["truncated"], text["count"], text["max_tokens"],
        )  # fmt: skip
