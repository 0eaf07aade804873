"""The training loop: steps, and what is due after them. It knows neither families nor objectives by name."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from diffpref.config import TrainConfig, to_dict
from diffpref.data.cached import EncodedPairs
from diffpref.errors import UserError
from diffpref.families.base import Family
from diffpref.objectives.base import Objective
from diffpref.training.batches import BatchBuilder
from diffpref.training.checkpoint import Checkpoint, Checkpoints
from diffpref.training.early_stop import EarlyStop
from diffpref.training.optim import (
    MovingAverage,
    copy_into,
    learning_rate,
)
from diffpref.training.samples import SampleGrids
from diffpref.training.stepper import Stepper
from diffpref.training.stop import Stopped, StopRequest
from diffpref.training.tracking import Row, Trackers, peak_memory_gb
from diffpref.training.validation import Validation

log = logging.getLogger("diffpref")
DISPLACEMENT_ROWS = 10


class Trainer:
    """One run, from its base model or from a checkpoint of it.

    Make it while `family.unet` still holds the base model's weights, its trained part already marked
    (`prepare_unet`): the reference, the held-out base errors and the base's sample row are taken from it.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        family: Family,
        objective: Objective,
        caches: Mapping[str, EncodedPairs],
        cache_folder: Path,
        inputs: dict[str, str],
        prompts: list[str],
        run: Path,
        start: Checkpoint | None,
        strategy: str,
        stop: StopRequest,
    ) -> None:
        """caches: "train" and, for measurements, "validation". inputs: fingerprints of pairs and model.
        prompts: of the sample grids. strategy: of
        `training.distributed.strategy`."""
        self.config, self.accelerator, self.objective, self.run = config, accelerator, objective, run
        self.stepper = Stepper(config, accelerator, family, objective, caches["train"], strategy, stop)
        self.distribution = self.stepper.distribution
        self.unet = self.stepper.unet
        self.validation = self._make_validation(family, caches.get("validation"))
        self.early_stop = EarlyStop(config.validation) if config.validation.patience else None
        self.grids = None
        if prompts and (accelerator.is_main_process or self.distribution.everywhere):
            self.grids = SampleGrids(
                config,
                prompts,
                family,
                self.unet,
                run / "samples",
                accelerator,
                self.distribution.everywhere,
            )
        micro_batch = start.state()["micro_batch"] if start is not None else None
        self.stepper.start(inputs, cache_folder, micro_batch)
        self.parameters = self.stepper.parameters
        decay = config.train.ema_decay
        self.average = MovingAverage(self.parameters, decay) if decay else None
        self.checkpoints = Checkpoints(run / "checkpoints", config.checkpoint.keep)
        self.step = self.saved_step = 0
        if start is not None:
            self._restore(start)
        self.trackers = None
        if accelerator.is_main_process:
            self.trackers = Trackers(run, config.log, to_dict(config), self.step)
        self.seconds, self.trained_pairs = 0.0, 0
        self._row_seconds, self._row_pairs = 0.0, 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=DISPLACEMENT_ROWS)
        self._warned = False

    @property
    def finished(self) -> bool:
        """All steps done, or stopped early."""
        early = self.early_stop is not None and self.early_stop.exhausted
        return early or self.step >= self.config.train.steps

    def train(self) -> None:
        """Run to the end. Raises Stopped after saving, when a stop was asked for."""
        bar = tqdm(
            total=self.config.train.steps, initial=self.step, unit="step", desc=f"train {self.run.name}",
            disable=not self.accelerator.is_main_process, file=sys.stderr, dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )  # fmt: skip
        try:
            with bar:
                while not self.finished:
                    stopping = self._timed_step()
                    self._after_step(bar, stopping)
                    if stopping and not self.finished:
                        raise Stopped
        finally:
            if self.trackers is not None:
                self.trackers.close()

    def exported_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the UNet has the weights to use: the best where the run watches for them, averaged
        ones where ema_decay is set."""
        if self.early_stop is not None and self.early_stop.weights:
            return self.distribution.swapped(self.early_stop.weights)
        return self._shown_weights()

    def _shown_weights(self) -> contextlib.AbstractContextManager[None]:
        if self.average is None:
            return contextlib.nullcontext()
        return self.distribution.swapped(self.average.tensors)

    def _make_validation(self, family: Family, held_out: EncodedPairs | None) -> Validation | None:
        if held_out is None:
            return None
        batches = BatchBuilder(family, held_out, self.config, self.accelerator.device)
        together = self.distribution.everywhere
        return Validation(self.config, family, batches, held_out.sizes, self.unet, self.accelerator, together)

    def _timed_step(self) -> bool:
        started = time.perf_counter()
        self.step += 1
        stopping = self.stepper.take(self.step)
        if self.average is not None:
            self.average.update(self.step)
        if stopping or self._anything_due():
            # before rows and checkpoints take the steps for granted
            stopping = self.stepper.settle() or stopping
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        self._row_seconds += elapsed
        self.trained_pairs += self.config.train.batch_size
        self._row_pairs += self.config.train.batch_size
        return stopping

    def _anything_due(self) -> bool:
        config = self.config
        every = (config.log.every, config.validation.every, config.sampling.every, config.checkpoint.every)
        return self.step == 1 or self.step == config.train.steps or any(_due(self.step, one) for one in every)

    def _after_step(self, bar: tqdm[Any], stopping: bool) -> None:
        """Rows first, then the checkpoint that takes them for granted."""
        config, step = self.config, self.step
        last = step == config.train.steps
        if step == 1 or last or step % config.log.every == 0:
            self._log(bar)
        bar.update()
        if self.validation is not None and (last or _due(step, config.validation.every)):
            self._measure(self.validation)
            last = self.finished  # now that early_stop has seen it
        if self.grids is not None and (last or _due(step, config.sampling.every)):
            with self._shown_weights():
                scores = self.grids.save(step, self.unet)
            if scores:
                self._write({"step": step, "scores": scores})
        if last or stopping or _due(step, config.checkpoint.every):
            self._save()

    def _measure(self, validation: Validation) -> None:
        with self._shown_weights():
            values = validation.measure(self.stepper.policy, self.objective)
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise UserError(
                f"the held-out {broken[0]} of step {self.step} is not finite",
                fix="lower train.learning_rate; the run can be continued from its last checkpoint",
            )
        self._write({"step": self.step, "validation": values})
        if self.early_stop is None:
            return
        weights = self.average.tensors if self.average is not None else self.parameters
        self.early_stop.update(self.step, values, weights)
        if self.early_stop.exhausted and self.accelerator.is_main_process:
            log.info(
                "stopping early at step %d: %s was best at step %d (%.4g)",
                self.step, self.config.validation.monitor, self.early_stop.best_step, self.early_stop.best,
            )  # fmt: skip

    def _log(self, bar: tqdm[Any]) -> None:
        means = self.stepper.meters.read()
        row: Row = {"step": self.step, **means, "learning_rate": learning_rate(self.step, self.config.train)}
        row["epoch"] = self.stepper.sampler.epoch(self.step)
        row["pairs_per_second"] = self._row_pairs / max(self._row_seconds, 1e-9)
        row["peak_memory_gb"] = peak_memory_gb(self.accelerator.device)
        self._row_seconds, self._row_pairs = 0.0, 0
        self._write(row)
        shown = {"loss": f"{row['loss']:.4g}"}
        if "implicit_accuracy" in row:
            shown["acc"] = f"{row['implicit_accuracy']:.3f}"
        bar.set_postfix(shown, refresh=False)
        self._watch_displacement(row)

    def _watch_displacement(self, row: Row) -> None:
        """Warn once when the margin grows although the policy gets worse on the winners themselves."""
        if self._warned or "margin" not in row:
            return
        self._recent.append((row["winner_gain"], row["margin"]))
        if len(self._recent) < DISPLACEMENT_ROWS or not self.accelerator.is_main_process:
            return
        gain, margin = (sum(values) / len(self._recent) for values in zip(*self._recent, strict=True))
        if gain < 0 < margin:
            self._warned = True
            log.warning(
                "likelihood displacement up to step %d: the margin grows (%.2g) while the winners' "
                "error rises above the reference's (by %.2g); a lower learning rate, a higher beta "
                "or a term on the winner helps",
                self.step, margin, -gain,
            )  # fmt: skip

    def _write(self, row: Row) -> None:
        if self.trackers is not None:
            self.trackers.write(row)

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        groups = self._groups()  # every process takes part
        if self.trackers is not None:
            self.trackers.metrics.sync()
            early = self.early_stop
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "stopped_early": early is not None and early.exhausted,
                "world_size": self.accelerator.num_processes,
                "micro_batch": self.stepper.micro_batch,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "early_stop": early.state() if early is not None else None,
            }
            self.checkpoints.save(self.step, groups, state)
        self.saved_step = self.step
        self.accelerator.wait_for_everyone()

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors of a checkpoint, whole."""
        whole, early = self.distribution.whole, self.early_stop
        groups: dict[str, Mapping[str, Tensor]] = {
            "weights": whole(self.parameters),
            "optimizer": self.distribution.state(),
        }
        meters = self.stepper.meters.state()
        groups |= {"meters": meters} if meters else {}
        groups |= {"average": whole(self.average.tensors)} if self.average is not None else {}
        groups |= {"best": whole(early.weights)} if early is not None and early.weights else {}
        return groups

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        part = self.distribution.part
        self.distribution.restore(checkpoint.tensors("weights"), checkpoint.tensors("optimizer"))
        if self.average is not None:
            copy_into(self.average.tensors, part(checkpoint.tensors("average")))
        if self.early_stop is not None and state["early_stop"]:
            best = part(checkpoint.tensors("best")) if checkpoint.has("best") else {}
            self.early_stop.restore(state["early_stop"], best)
        if checkpoint.has("meters"):
            self.stepper.meters.restore(checkpoint.tensors("meters"))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = self.saved_step = int(state["step"])
        self.accelerator.wait_for_everyone()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
