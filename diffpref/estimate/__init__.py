"""What a run will take, before any of it is paid for: memory of the device, and FLOPs per pair and step.

Nothing is loaded. The UNet is built from its config, filled with fake tensors (shapes and types, no memory),
and put through the very code of a training step, while every allocation and matrix product is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffpref.config import TrainConfig
from diffpref.data.cache_need import bytes_of_pair
from diffpref.errors import UserError
from diffpref.estimate.extrapolation import Footprint
from diffpref.estimate.optimizers import optimizer_bytes
from diffpref.estimate.skeleton import Skeleton, make_skeleton
from diffpref.estimate.tracing import trace_micro_batch
from diffpref.training.micro_batch import HEADROOM, divisors
from diffpref.training.reference import FrozenCopy

GIB = 2**30
FP32 = 4  # bytes

__all__ = ["Estimate", "Hardware", "estimate"]


@dataclass(frozen=True)
class Hardware:
    """What a run is estimated for. memory: GiB of each GPU. tflops: its rate of dense matrix products in the
    run's precision, as the maker states it. share: of that rate which training reaches, an assumption.

    Raises UserError for what is no size, rate, share or number of GPUs.
    """

    gpus: int = 1
    memory: float | None = None
    tflops: float | None = None
    share: float = 0.4

    def __post_init__(self) -> None:
        checks = (
            ("--gpus", self.gpus, self.gpus >= 1, "it is a number of GPUs, at least 1"),
            ("--gpu-memory", self.memory, _in(self.memory, math.inf), "it is a size in GiB, above 0"),
            ("--tflops", self.tflops, _in(self.tflops, math.inf), "it is a rate in TFLOP/s, above 0"),
            ("--share", self.share, _in(self.share, 1.0) or self.share == 1, "it is above 0 and at most 1"),
        )
        for option, value, allowed, why in checks:
            if not allowed:
                raise UserError(f"{option} {value:g} is not allowed", why=why)


def _in(value: float | None, end: float) -> bool:
    return value is None or 0 < value < end


@dataclass(frozen=True)
class Estimate:
    """memory: bytes by item; "overlap", at most 0, is what is not there at once, so that the sum is the peak.
    flops: per pair, by phase. largest: the largest micro-batch that fits, 0 where none does, None where no
    limit was given."""

    config: TrainConfig
    kind: str  # class of the pipeline
    parameters: int
    trained: int
    micro_batch: int
    memory: dict[str, int]
    bytes_per_pair: int  # what a further pair in the micro-batch adds to the activations
    flops: dict[str, float]
    limit: float | None  # bytes of the GPU
    largest: int | None
    disk: dict[str, int]  # bytes: "checkpoint", "checkpoints" (those kept, and one being written), "model",
    # "latents" of a pair in the cache
    hardware: Hardware

    @property
    def hours(self) -> float | None:
        """Of all steps, at the stated share of the GPUs' matmul rate; None without a rate."""
        if self.hardware.tflops is None:
            return None
        train = self.config.train
        flops = sum(self.flops.values()) * train.batch_size * train.steps
        return flops / (self.hardware.gpus * self.hardware.tflops * 1e12 * self.hardware.share) / 3600

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool | None:
        return None if self.limit is None else self.peak <= HEADROOM * self.limit

    def as_json(self) -> dict[str, Any]:
        """Bytes, FLOPs (2 per multiply-add) and pairs."""
        config = self.config
        step = {name: count * config.train.batch_size for name, count in self.flops.items()}
        return {
            "model": config.model.base,
            "pipeline": self.kind,
            "objective": config.objective.name,
            "resolution": config.data.resolution,
            "parameters": {"total": self.parameters, "trained": self.trained},
            "batch_size": config.train.batch_size,
            "micro_batch": self.micro_batch,
            "memory": self.memory | {"peak": self.peak},
            "memory_per_pair": self.bytes_per_pair,
            "flops_per_pair": self.flops | {"total": sum(self.flops.values())},
            "flops_per_step": step | {"total": sum(step.values())},
            "gpu_memory": self.limit,
            "fits": self.fits,
            "largest_micro_batch": self.largest,
            "gpus": self.hardware.gpus,
            "disk": self.disk,
            "tflops": self.hardware.tflops,
            "share": self.hardware.share,
            "hours": self.hours,
        }


def estimate(config: TrainConfig, hardware: Hardware | None = None, cuda: bool = True) -> Estimate:
    """What the run of `config` takes, memory on each of the GPUs.

    With train.micro_batch = "auto" the memory of `hardware` decides the micro-batch, which is one pair
    without it. cuda: with CUDA's rules of mixed precision, else the CPU's. Raises UserError for a model that
    is not to be had or does not fit the config, and for a batch that does not split evenly over the GPUs.
    """
    hardware = hardware or Hardware()
    if config.train.batch_size % hardware.gpus:
        raise UserError(
            f"train.batch_size = {config.train.batch_size} does not split evenly over {hardware.gpus} GPUs",
            fix="choose a multiple of the number of GPUs",
        )
    limit = hardware.memory * GIB if hardware.memory is not None else None
    local = config.train.batch_size // hardware.gpus
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton = make_skeleton(config, mode)
    with mode:
        one, two = (trace_micro_batch(skeleton, pairs, cuda) for pairs in (1, 2))
    fixed, footprint = _fixed(skeleton), Footprint(one, two)
    peak = partial(_peak, local, fixed, footprint)
    largest = None
    if limit is not None:
        sizes = divisors(local)
        largest = next((pairs for pairs in sizes if peak(pairs) <= HEADROOM * limit), 0)
    pairs = min(_micro_batch(config, largest) or local, local)
    accumulates = pairs < local
    activations, constant = footprint.activations(pairs, accumulates)
    memory = fixed | {"constant": constant, "activations": activations - constant}
    return Estimate(
        config=config,
        kind=skeleton.kind,
        parameters=sum(parameter.numel() for parameter in skeleton.unet.parameters()),
        trained=sum(parameter.numel() for parameter in skeleton.trained),
        micro_batch=pairs,
        memory=memory | {"overlap": peak(pairs) - sum(memory.values())},
        bytes_per_pair=footprint.activations(pairs + 1, accumulates)[0] - activations,
        flops={name: count / pairs for name, count in footprint.flops(pairs).items()},
        limit=limit,
        largest=largest,
        disk=_disk(skeleton, fixed),
        hardware=hardware,
    )


def _disk(skeleton: Skeleton, fixed: dict[str, int]) -> dict[str, int]:
    """Of a checkpoint, those kept with one being written, the exported weights, a pair's cached latents."""
    config, trained = skeleton.config, fixed["gradients"]
    best = trained if config.validation.patience else 0
    checkpoint = trained + fixed["optimizer"] + fixed["average"] + best
    side = config.data.resolution // skeleton.family.codec.factor
    latent = (int(skeleton.unet.config.in_channels), side, side)
    return {
        "checkpoint": checkpoint,
        "checkpoints": (config.checkpoint.keep + 1) * checkpoint,
        "model": fixed["weights"] if config.adapter.type == "none" else trained,
        "latents": bytes_of_pair(config.data, latent) if config.data.cache_latents else 0,
    }


def _fixed(skeleton: Skeleton) -> dict[str, int]:
    """Bytes of what stays on the device for the whole run, and of all gradients."""
    train, reference = skeleton.config.train, skeleton.reference
    gradients = _bytes(skeleton.trained)
    return {
        "weights": _bytes(skeleton.unet.parameters()),
        "gradients": gradients,
        "optimizer": optimizer_bytes([parameter.shape for parameter in skeleton.trained], train.optimizer),
        "average": gradients if train.ema_decay else 0,
        "reference": _bytes(reference.unet.parameters()) if isinstance(reference, FrozenCopy) else 0,
        "vae": _bytes(skeleton.vae.parameters()) if skeleton.vae is not None else 0,
    }


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _peak(local: int, fixed: dict[str, int], footprint: Footprint, pairs: int) -> int:
    """Bytes at the peak of a step with micro-batches of `pairs` out of `local`."""
    stays = sum(fixed.values()) - fixed["gradients"]
    return stays + footprint.peak(pairs, accumulates=pairs < local)


def _micro_batch(config: TrainConfig, largest: int | None) -> int:
    """0: the whole batch of a process."""
    wanted = config.train.micro_batch
    return (largest or 1) if wanted == "auto" else int(wanted)
