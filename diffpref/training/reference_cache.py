"""Reference errors taken once, on the draws that training will see, for reference.kind = "cached".

Every pair has reference.draws fixed draws (timestep, noise, latent, flip, dropout); its v-th visit uses draw
v modulo that. The errors are taken in training's own micro-batches, in training's order, so that policy and
reference run the same kernels on the same shapes and an untrained policy's margin is exactly 0.

    FOLDER/reference-HASH/RANK-00000-64.safetensors   64 steps in the file: pair, draw, errors
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from diffpref.config import TrainConfig
from diffpref.data.cache import locked_build
from diffpref.data.disk import told_when_disk_is_full
from diffpref.data.sampler import BucketSampler
from diffpref.data.tensors import digest_of, save_tensors
from diffpref.families.base import Family
from diffpref.paths import fingerprint
from diffpref.training.batches import BatchBuilder
from diffpref.training.pair_errors import pair_errors
from diffpref.training.reference import CachedErrors

log = logging.getLogger("diffpref")
STEPS_A_FILE = 64
DIGEST = "sha256"  # in the header: of the tensors
MicroBatches = Callable[[int], list[tuple[list[int], list[int]]]]
"""(pairs, earlier visits of each) of every micro-batch of this process at a step, from 1."""


@dataclass(frozen=True)
class ReferenceCache:
    """Builds or opens the cache of a run. `inputs`: fingerprints of the pairs and of the base UNet."""

    config: TrainConfig
    accelerator: Accelerator
    family: Family
    batches: BatchBuilder
    sampler: BucketSampler
    micro_batches: MicroBatches
    inputs: dict[str, str]
    check: Callable[[], None]  # may stop the build

    def build(self, folder: Path, unet: nn.Module, micro_batch: int) -> CachedErrors:
        """Take what is missing with `unet`, the base model; all processes together."""
        place = folder / f"reference-{fingerprint(self._key(micro_batch))[:16]}"
        started, taken = time.perf_counter(), 0
        plan = list(self._plan())
        bar = tqdm(
            total=sum(len(part) for part in plan), unit="step", desc="reference errors", leave=False,
            file=sys.stderr, disable=not self.accelerator.is_main_process,
        )  # fmt: skip
        waits = locked_build(place, self.check) if self.accelerator.is_main_process else nullcontext()
        told = told_when_disk_is_full(f"reference errors in {place}", "finished files will be used")
        with waits, bar, told:
            self.accelerator.wait_for_everyone()  # for the main process to have the lock
            for number, steps in enumerate(plan):
                path = place / f"{self.accelerator.process_index}-{number:05d}-{len(steps)}.safetensors"
                self.check()
                if self._missing(path):
                    taken_here = self._take(steps, unet)
                    save_tensors(path, taken_here, {DIGEST: digest_of(taken_here)})
                    taken += len(steps)
                bar.update(len(steps))
            self.accelerator.wait_for_everyone()
        if taken:
            log.info(
                "reference errors of %d steps taken in %.1f s; kept in %s",
                taken, time.perf_counter() - started, place,
            )  # fmt: skip
        return CachedErrors(self._open(place))

    def _key(self, micro_batch: int) -> dict[str, Any]:
        """Everything that decides a draw, its batch or its error."""
        config = self.config
        data = asdict(config.data)
        for name in ("pairs", "validation", "columns", "cache_dir", "workers", "max_bad_share", "max_pairs"):
            del data[name]  # the fingerprint of the pairs speaks for them
        return {
            "format": 1,
            "inputs": {name: value for name, value in self.inputs.items() if name != "pairs.validation"},
            "data": data,
            "seed": config.seed,
            "draws": config.reference.draws,
            "timesteps": [config.train.min_timestep, config.train.max_timestep],
            "batch": [config.train.batch_size, micro_batch, self.accelerator.num_processes],
            "kernels": [
                config.train.mixed_precision, config.train.tf32, config.train.channels_last,
                config.train.compile, config.model.attention, self.accelerator.device.type,
            ],
        }  # fmt: skip

    def _missing(self, path: Path) -> bool:
        """Whether any process misses its file, or has a damaged one: a forward pass may need them all."""
        missing = torch.tensor([float(read_errors(path) is None)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(missing, "sum").item())

    def _plan(self) -> Iterator[list[int]]:
        """Steps with pairs that are visited for one of their first `draws` times, in files' worths."""
        part: list[int] = []
        for step in range(1, self.config.train.steps + 1):
            # of the whole batch, so that all processes agree
            if int(self.sampler.visits(step - 1).min()) < self.config.reference.draws:
                part.append(step)
            if len(part) == STEPS_A_FILE:
                yield part
                part = []
        if part:
            yield part

    @torch.no_grad()
    def _take(self, steps: list[int], unet: nn.Module) -> dict[str, Tensor]:
        draws = self.config.reference.draws
        columns: dict[str, list[Tensor]] = {"pair": [], "draw": [], "errors": []}
        for step in steps:
            for pairs, visits in self.micro_batches(step):
                batch = self.batches.visit([visit % draws for visit in visits], pairs)
                errors = pair_errors(self.family, batch, unet, None, self.accelerator.autocast)
                first = torch.tensor(visits) < draws  # later visits read what an earlier one left
                columns["pair"].append(torch.tensor(pairs)[first])
                columns["draw"].append(torch.tensor(visits)[first])
                columns["errors"].append(torch.stack([errors.policy_w, errors.policy_l], 1).cpu()[first])
        return {name: torch.cat(values) for name, values in columns.items()}

    def _open(self, place: Path) -> Tensor:
        table = torch.full((self.sampler.n, self.config.reference.draws, 2), float("nan"))
        for path in sorted(place.glob("*.safetensors")):
            part = read_errors(path)
            if part is not None:
                table[part["pair"], part["draw"]] = part["errors"]
        return table


def read_errors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file, compared with the digest in its header; None, and a warning, when damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            digest = (file.metadata() or {}).get(DIGEST)
            part = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        if digest == digest_of(part):
            return part
        why = "it has other values than were written"
    except (SafetensorError, OSError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
    log.warning("%s is damaged (%s): its reference errors are taken again", path, why)
    return None
