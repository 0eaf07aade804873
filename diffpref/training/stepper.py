"""One optimizer step: pairs, errors, loss, gradient, update. Nothing in it waits for the device."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffpref.config import TrainConfig
from diffpref.data.cached import EncodedPairs
from diffpref.data.sampler import BucketSampler, repeats
from diffpref.errors import UserError
from diffpref.families.base import Family
from diffpref.objectives.base import Objective
from diffpref.training.batches import Batch, BatchBuilder
from diffpref.training.distributed import distribute, shard
from diffpref.training.flags import Raised, StepFlags
from diffpref.training.meters import Meters
from diffpref.training.micro_batch import find_micro_batch
from diffpref.training.optim import learning_rate
from diffpref.training.pair_errors import pair_errors
from diffpref.training.policy import compile_blocks
from diffpref.training.precision import HALF, cast_frozen
from diffpref.training.reference import AdaptersOff, CachedErrors, FrozenCopy, Reference
from diffpref.training.reference_cache import ReferenceCache
from diffpref.training.stop import StopRequest

log = logging.getLogger("diffpref")
REPEATED = 2**40  # apart from any step


class Stepper:
    """The policy, its reference and its optimizer.

    Make it while `family.unet` still holds the base model's weights, its trained part already marked
    (`prepare_unet`); then call `start` once, before the weights are changed or restored.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        family: Family,
        objective: Objective,
        cache: EncodedPairs,
        strategy: str,
        stop: StopRequest,
    ) -> None:
        """strategy: of `training.distributed.strategy`."""
        self.config, self.accelerator, self.family, self.objective = config, accelerator, family, objective
        self.cache, self.stop = cache, stop
        self.local_batch = config.train.batch_size // accelerator.num_processes
        self.micro_batch = 0
        first = accelerator.process_index * self.local_batch
        self._mine = slice(first, first + self.local_batch)
        self._fixed_draws = objective.needs_reference and config.reference.kind == "cached"
        self.sampler = BucketSampler(cache.sizes, config.train.batch_size, config.seed)
        self.batches = BatchBuilder(family, cache, config, accelerator.device)
        # Sharded over processes weights must all be of one type.
        self._half = HALF.get(config.train.mixed_precision) if strategy != "fsdp2" else None
        if self._half is not None:
            cast_frozen(family.unet, self._half)  # here, so that a small card never has them in fp32
        self.unet = family.unet.to(accelerator.device)
        if config.train.channels_last and accelerator.device.type == "cuda":
            self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.reference = self._model_reference()
        self.meters = Meters(accelerator)
        self.flags = StepFlags(accelerator)
        if strategy == "fsdp2" and isinstance(self.reference, FrozenCopy):
            shard(self.reference.unet, accelerator)
        self.distribution = distribute(strategy, self.unet, accelerator, config)
        self.policy, self.parameters = self.distribution.policy, self.distribution.parameters
        self.optimizer = self.distribution.optimizer
        # A fused optimizer leaves out a step whose gradient is not finite, without the host having to look.
        self._guarded = self.distribution.skips_broken and accelerator.scaler is None
        if self._guarded:
            self.optimizer.found_inf = self.flags.broken  # type: ignore[attr-defined]
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def start(self, inputs: dict[str, str], folder: Path, micro_batch: int | None) -> None:
        """Find the micro-batch, compile, and take the reference's errors where they are cached.

        inputs: fingerprints of pairs and model. folder: of the caches. micro_batch: of the run that is
        continued, None for a new one.
        """
        config, accelerator = self.config, self.accelerator
        wanted = config.train.micro_batch
        if wanted == "auto":
            self.micro_batch = micro_batch or self._largest_micro_batch()
            if accelerator.is_main_process:
                log.info("micro-batch: %d pairs of %d", self.micro_batch, self.local_batch)
        else:
            self.micro_batch = int(wanted) or self.local_batch
        if config.train.compile and accelerator.device.type == "cuda":
            self._compile()
        if self._fixed_draws:
            cache = ReferenceCache(
                config,
                accelerator,
                self.family,
                self.batches,
                self.sampler,
                self.micro_batches,
                inputs,
                self.stop.check if accelerator.num_processes == 1 else lambda: None,
            )
            self.reference = cache.build(folder, self.unet, self.micro_batch)

    def take(self, step: int) -> bool:
        """One update with the pairs of `step` (from 1). Returns whether a stop was asked for on any
        process."""
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, train)
        micro_batches = self.micro_batches(step)
        losses = []
        for number, ((pairs, _), draws) in enumerate(zip(micro_batches, self._draws(step), strict=True)):
            batch = self.batches.visit(draws, pairs)
            losses.append(self._accumulate(batch, number + 1 == len(micro_batches)))
        norm = self._clip()
        stopping = self._raise_flags(
            step, [pair for pairs, _ in micro_batches for pair in pairs], losses, norm
        )
        self.distribution.step()
        clipped = (norm > train.max_grad_norm).float() if train.max_grad_norm else torch.zeros_like(norm)
        overflow = (~torch.isfinite(norm)).float()
        values = {"grad_norm": torch.nan_to_num(norm, nan=0.0, posinf=0.0), "clipped": clipped}
        self.meters.add_step(values | ({"skipped": overflow} if self.accelerator.scaler is not None else {}))
        return stopping

    def settle(self) -> bool:
        """Wait for the device and make sure that every step so far was finite. Returns whether a stop was
        asked for on any process."""
        raised = self.flags.drain()
        for one in raised:
            self._check(one)
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < 2.0**-14:
            raise UserError(
                "fp16 gradients overflow at every step",
                why="the loss scale has fallen below 2^-14",
                fix='set train.mixed_precision = "bf16" or "no", or lower train.learning_rate',
            )
        return self.stop.requested if self.accelerator.num_processes == 1 else any(one.stop for one in raised)

    def micro_batches(self, step: int) -> list[tuple[list[int], list[int]]]:
        """(pairs, earlier visits of each) of every micro-batch of this process at `step` (from 1)."""
        pairs = self.sampler.indices(step - 1)[self._mine].split(self.micro_batch)
        visits = self.sampler.visits(step - 1)[self._mine].split(self.micro_batch)
        return [(some.tolist(), times.tolist()) for some, times in zip(pairs, visits, strict=True)]

    def _model_reference(self) -> Reference | None:
        kind = self.config.reference.kind
        if not self.objective.needs_reference or kind == "cached":
            return None  # `start` fills a cache
        if kind == "adapter" or (kind == "auto" and self.config.adapter.type != "none"):
            return AdaptersOff(self.unet)
        return FrozenCopy(self.unet, self._half)

    def _compile(self) -> None:
        """Once the micro-batch is known: every size that is tried would be compiled for."""
        compile_blocks(self.unet)
        if isinstance(self.reference, FrozenCopy):
            compile_blocks(self.reference.unet)

    def _draws(self, step: int) -> list[list[int]]:
        """What the random numbers of each pair of each micro-batch are drawn for: the step, or with a cached
        reference one of the pair's fixed draws. A pair that a step has again gets others."""
        if self._fixed_draws:
            draws = self.sampler.visits(step - 1) % self.config.reference.draws
        else:
            draws = step + REPEATED * repeats(self.sampler.indices(step - 1), self.sampler.visits(step - 1))
        return [some.tolist() for some in draws[self._mine].split(self.micro_batch)]

    def _accumulate(self, batch: Batch, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; returns its losses, detached [micro_batch]."""
        with self.distribution.accumulate(last):
            errors = pair_errors(self.family, batch, self.policy, self.reference, self.accelerator.autocast)
            output = self.objective(errors)
            # Processes' gradients are averaged, so each adds its pairs' share of the global mean times their
            # number.
            share = self.accelerator.num_processes / self.config.train.batch_size
            self.distribution.backward(output.loss.sum() * share)
        self.meters.add_pairs({"loss": output.loss, **output.metrics})
        return output.loss.detach()

    def _clip(self) -> Tensor:
        """Scale the gradient down to max_grad_norm; returns its norm before that."""
        limit = self.config.train.max_grad_norm or float("inf")
        return self.distribution.clip(limit)

    def _raise_flags(self, step: int, pairs: list[int], losses: list[Tensor], norm: Tensor) -> bool:
        """Tell all processes of a value that is not finite, or of a stop. Returns whether to stop."""
        joined = torch.cat(losses)
        broken = ~torch.isfinite(joined).all()
        if self.accelerator.scaler is None:  # with fp16 a gradient may overflow: the scaler handles it
            broken = broken | ~torch.isfinite(norm)
        stop = self.stop.requested
        seen = [self.flags.push(step, broken, stop, pairs, joined)]
        if not self._guarded and self.accelerator.scaler is None:
            seen += self.flags.drain()  # this optimizer must not be given the gradient: wait and see
        raised = [one for one in seen if one is not None]
        for one in raised:
            self._check(one)
        if self.accelerator.num_processes == 1:
            return stop
        return any(one.stop for one in raised)

    def _check(self, raised: Raised) -> None:
        if not raised.broken:
            return
        losses = torch.isfinite(raised.losses).tolist()
        bad = [pair for pair, finite in zip(raised.pairs, losses, strict=True) if not finite]
        ids = ", ".join(str(self.cache.pair_ids[pair]) for pair in (bad or raised.pairs)[:16])
        raise UserError(
            f"the {'loss' if bad else 'gradient'} of step {raised.step} is not finite",
            why=f"pairs of this process concerned (ids): {ids}; the optimizer step was not taken",
            fix="lower train.learning_rate, set train.max_grad_norm, or use bf16 or full precision; "
            "the run can be continued from its last checkpoint",
        )

    def _largest_micro_batch(self) -> int:
        pairs = self.sampler.indices(0)[: self.local_batch].tolist()
        # Where the optimizer's state and the moving average will be: with 8 bits a moment takes a byte.
        kinds = {"adamw": [torch.float32] * 2, "adamw8bit": [torch.uint8] * 2, "adafactor": []}
        later = kinds[self.config.train.optimizer] + [torch.float32] * bool(self.config.train.ema_decay)
        ballast = [
            torch.empty_like(weight, dtype=kind) for weight in self.parameters.values() for kind in later
        ]
        reference = self.reference
        if self._fixed_draws:  # its errors are taken once the micro-batch is known
            reference = CachedErrors(torch.zeros(len(self.cache), self.config.reference.draws, 2))

        def probe(count: int) -> None:
            batch = self.batches.visit([0] * count, pairs[:count])
            with self.distribution.accumulate(last=False):
                errors = pair_errors(self.family, batch, self.policy, reference, self.accelerator.autocast)
                output = self.objective(errors)
                self.distribution.backward(output.loss.sum() * 0.0)
            self.optimizer.zero_grad(set_to_none=True)

        found = find_micro_batch(self.accelerator, self.local_batch, probe)
        del ballast
        return found
