"""The training loop. It knows neither families nor objectives by name: errors in, loss out, check, step."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from diffpref.config import TrainConfig, to_dict
from diffpref.data.cached import LatentCache
from diffpref.data.sampler import PairSampler
from diffpref.errors import UserError
from diffpref.families.base import Family
from diffpref.objectives.base import Objective
from diffpref.training.batches import BatchBuilder
from diffpref.training.checkpoint import Checkpoint, Checkpoints
from diffpref.training.meters import Meters
from diffpref.training.optim import (
    MovingAverage,
    copy_into,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    trainable,
)
from diffpref.training.pair_errors import pair_errors
from diffpref.training.reference import AdaptersOff, FrozenCopy, Reference
from diffpref.training.samples import SampleGrids
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
        cache: LatentCache,
        held_out: LatentCache | None,
        prompts: list[str],
        run: Path,
        start: Checkpoint | None,
        stop: StopRequest,
    ) -> None:
        self.config, self.accelerator, self.family, self.objective = config, accelerator, family, objective
        self.cache, self.run, self.stop = cache, run, stop
        self.local_batch = config.train.batch_size // accelerator.num_processes
        self.micro_batch = config.train.micro_batch or self.local_batch
        self.sampler = PairSampler(len(cache), config.train.batch_size, config.seed)
        self.batches = BatchBuilder(family, cache, config, accelerator.device)
        self.unet = family.unet.to(accelerator.device)
        self.reference = self._make_reference()
        self.validation = self._make_validation(held_out)
        self.grids = None
        if prompts and accelerator.is_main_process:
            self.grids = SampleGrids(
                config.sampling, prompts, config.data.resolution, family, self.unet, run / "samples"
            )
        self.policy = accelerator.prepare_model(self.unet) if accelerator.num_processes > 1 else self.unet
        self.parameters = trainable(self.unet)
        self.optimizer = make_optimizer(self.parameters, config.train)
        decay = config.train.ema_decay
        self.average = MovingAverage(self.parameters, decay) if decay else None
        self.meters = Meters(accelerator)
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

    def train(self) -> None:
        """Run to the last step. Raises Stopped after saving, when a stop was asked for."""
        bar = tqdm(
            total=self.config.train.steps, initial=self.step, unit="step", desc=f"train {self.run.name}",
            disable=not self.accelerator.is_main_process, file=sys.stderr, dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )  # fmt: skip
        try:
            with bar:
                while self.step < self.config.train.steps:
                    stopping = self._timed_step()
                    self._after_step(bar, stopping)
                    if stopping and self.step < self.config.train.steps:
                        raise Stopped
        finally:
            if self.trackers is not None:
                self.trackers.close()

    def final_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the UNet has the weights to use: averaged ones where ema_decay is set."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()

    def _make_reference(self) -> Reference | None:
        if not self.objective.needs_reference:
            return None
        return AdaptersOff(self.unet) if self.config.adapter.type == "lora" else FrozenCopy(self.unet)

    def _make_validation(self, held_out: LatentCache | None) -> Validation | None:
        if held_out is None:
            return None
        batches = BatchBuilder(self.family, held_out, self.config, self.accelerator.device)
        return Validation(self.config, self.family, batches, len(held_out), self.unet, self.accelerator)

    def _timed_step(self) -> bool:
        started = time.perf_counter()
        stopping = self._optimizer_step(self.step + 1)
        self.step += 1
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        self._row_seconds += elapsed
        self.trained_pairs += self.config.train.batch_size
        self._row_pairs += self.config.train.batch_size
        return stopping

    def _optimizer_step(self, step: int) -> bool:
        """One update with the pairs of `step` (from 1). Returns whether a stop was asked for on any
        process."""
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, train)
        first = self.accelerator.process_index * self.local_batch
        pairs = self.sampler.indices(step - 1)[first : first + self.local_batch].tolist()
        losses = [self._accumulate(step, pairs, start) for start in range(0, len(pairs), self.micro_batch)]
        norm = self._clip()
        stopping = self._check_finite(step, pairs, torch.cat(losses), norm)
        scaler = self.accelerator.scaler
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)  # leaves the step out when an fp16 gradient overflowed
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step)
        clipped = (norm > train.max_grad_norm).float() if train.max_grad_norm else torch.zeros_like(norm)
        overflow = (~torch.isfinite(norm)).float()
        values = {"grad_norm": torch.nan_to_num(norm, nan=0.0, posinf=0.0), "clipped": clipped}
        self.meters.add_step(values | ({"skipped": overflow} if scaler is not None else {}))
        return stopping

    def _accumulate(self, step: int, pairs: list[int], start: int) -> Tensor:
        """Forward and backward of one micro-batch; returns its losses, detached [micro_batch]."""
        last = start + self.micro_batch >= len(pairs)
        batch = self.batches.train(step, pairs[start : start + self.micro_batch])
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy):
            errors = pair_errors(self.family, batch, self.policy, self.reference, self.accelerator.autocast)
            output = self.objective(errors)
            # Processes' gradients are averaged, so each adds its pairs' share of the global mean times their
            # number.
            share = self.accelerator.num_processes / self.config.train.batch_size
            self.accelerator.backward(output.loss.sum() * share)
        self.meters.add_pairs({"loss": output.loss, **output.metrics})
        return output.loss.detach()

    def _clip(self) -> Tensor:
        """Scale the gradient down to max_grad_norm; returns its norm before that."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        limit = self.config.train.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)

    def _check_finite(self, step: int, pairs: list[int], losses: Tensor, norm: Tensor) -> bool:
        """Stop before the optimizer would spread a NaN. The one place where a step waits for the device.

        Returns whether any process was asked to stop, so that all leave at the same step.
        """
        broken = ~torch.isfinite(losses).all()
        if self.accelerator.scaler is None:  # with fp16 a gradient may overflow: the scaler handles it
            broken = broken | ~torch.isfinite(norm)
        flags = torch.stack([broken.float(), torch.full_like(norm, float(self.stop.requested))])
        broken_count, stop_count = self.accelerator.reduce(flags, "sum").tolist()
        if not broken_count:
            self._check_scale(step)
            return bool(stop_count)
        bad = [pair for pair, loss in zip(pairs, losses.tolist(), strict=True) if not _is_finite(loss)]
        what = "loss" if bad else "gradient"
        ids = ", ".join(str(self.cache.pair_ids[pair]) for pair in (bad or pairs)[:16])
        raise UserError(
            f"the {what} of step {step} is not finite",
            why=f"pairs of this process concerned (ids): {ids}; the optimizer step was not taken",
            fix="lower train.learning_rate, set train.max_grad_norm, or use bf16 or full precision; "
            "the run can be continued from its last checkpoint",
        )

    def _check_scale(self, step: int) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < 2.0**-14:
            raise UserError(
                f"fp16 gradients overflow at every step up to {step}",
                why="the loss scale has fallen below 2^-14",
                fix='set train.mixed_precision = "bf16" or "no", or lower train.learning_rate',
            )

    def _after_step(self, bar: tqdm[Any], stopping: bool) -> None:
        """Rows first, then the checkpoint that takes them for granted."""
        config, step = self.config, self.step
        last = step == config.train.steps
        if step == 1 or last or step % config.log.every == 0:
            self._log(bar)
        bar.update()
        if self.validation is not None and (last or _due(step, config.validation.every)):
            with self.final_weights():
                values = self.validation.measure(self.policy, self.objective)
            self._write({"step": step, "validation": values})
        if self.grids is not None and (last or _due(step, config.sampling.every)):
            with self.final_weights():
                self.grids.save(step, self.unet)
        if last or stopping or _due(step, config.checkpoint.every):
            self._save()

    def _log(self, bar: tqdm[Any]) -> None:
        means = self.meters.read()
        row: Row = {"step": self.step, **means, "learning_rate": learning_rate(self.step, self.config.train)}
        row["epoch"] = self.sampler.epoch(self.step)
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
        meters = self.meters.state()  # every process takes part
        if self.trackers is not None:
            self.trackers.metrics.sync()
            groups: dict[str, Mapping[str, Tensor]] = {
                "weights": dict(self.parameters),
                "optimizer": optimizer_tensors(self.optimizer, self.parameters),
            }
            groups |= {"meters": meters} if meters else {}
            groups |= {"average": self.average.tensors} if self.average is not None else {}
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "world_size": self.accelerator.num_processes,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            self.checkpoints.save(self.step, groups, state)
        self.saved_step = self.step
        self.accelerator.wait_for_everyone()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        copy_into(self.parameters, checkpoint.tensors("weights"))
        restore_optimizer(self.optimizer, self.parameters, checkpoint.tensors("optimizer"))
        if self.average is not None:
            copy_into(self.average.tensors, checkpoint.tensors("average"))
        if checkpoint.has("meters"):
            self.meters.restore(checkpoint.tensors("meters"))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = self.saved_step = int(state["step"])
        self.accelerator.wait_for_everyone()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
