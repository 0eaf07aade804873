"""What must hold before anything is loaded: device, precision, processes, batch sizes, packages, threads."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from PIL import Image

from diffpref import threads
from diffpref.config import TrainConfig
from diffpref.data.buckets import equal_area
from diffpref.errors import UserError
from diffpref.families.base import Family
from diffpref.processes import best_device, place_in_launch
from diffpref.training.distributed import DEEPSPEED, FSDP, strategy
from diffpref.training.samples import grid_evaluators
from diffpref.training.tracking import check_trackers

log = logging.getLogger("diffpref")
BARRIER_LIMIT = timedelta(hours=12)  # one process may encode, validate or save for long while the others wait


@dataclass(frozen=True)
class Launch:
    """How the run was launched. strategy: of `training.distributed.strategy`."""

    accelerator: Accelerator
    strategy: str


def make_launch(config: TrainConfig) -> Launch:
    """Check the config against this machine and set up device, precision and processes.

    Raises UserError: fp16 or xformers on the CPU, a package that is not installed, a launch that is not
    supported or whose processes do not find one another, a batch that does not split evenly.
    """
    check_trackers(config.log)
    _check_packages(config)
    _check_device(config)
    set_numerics(config)
    if config.train.threads > torch.get_num_threads() and place_in_launch().main:
        log.info(
            f"train.threads: {torch.get_num_threads()} instead of {config.train.threads}, "
            f"since OMP_NUM_THREADS = {os.environ['OMP_NUM_THREADS']}"
        )
    kind = strategy()
    for name in (FSDP, DEEPSPEED):
        os.environ.pop(name, None)  # accelerate then only starts the processes: the rest is ours
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        # a second run in this process may differ in precision
        AcceleratorState._reset_state(reset_partial_state=True)
    # before the processes join: one that ends at once would leave the others a broken connection
    _check_split(config, world)
    if kind != "replicated":
        _check_sharded(config, {"fsdp2": "FSDP", "zero2": "DeepSpeed"}[kind])
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=BARRIER_LIMIT)],
    )
    if world != accelerator.num_processes:
        raise UserError(
            f"WORLD_SIZE is {world}, but accelerate runs {accelerator.num_processes} process(es)",
            why="each process would train alone and overwrite the others' files",
            fix="on the CPU: ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m diffpref train ...; "
            "without several processes unset WORLD_SIZE",
        )
    return Launch(accelerator, kind)


def set_numerics(config: TrainConfig) -> None:
    """Precision of matrix products and number of threads: what shapes the bits of every result."""
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.train.tf32
    if config.train.threads:
        torch.set_num_threads(threads.at_most(config.train.threads))


def _check_sharded(config: TrainConfig, name: str) -> None:
    if config.train.optimizer != "adamw":
        raise UserError(
            f'train.optimizer = "{config.train.optimizer}" does not work with {name}',
            why="its state is shared between the elements of a weight, and a process has only some of them",
            fix='use train.optimizer = "adamw": sharded, its state is small',
        )
    if config.train.channels_last:
        raise UserError(
            f"train.channels_last does not work with {name}",
            why="it slices weights as rows of memory in their usual order",
            fix="leave it out",
        )
    if config.train.micro_batch == "auto":
        raise UserError(
            f'train.micro_batch = "auto" does not work with {name}',
            why="a process that runs out of memory alone would leave the others waiting for it",
            fix="give a number; `diffpref estimate` says what fits",
        )
    if config.train.mixed_precision == "fp16":
        raise UserError(
            f'train.mixed_precision = "fp16" does not work with {name}',
            why="the loss scale of each process would go its own way",
            fix='use "bf16"',
        )


def check_model(config: TrainConfig, family: Family) -> None:
    """Raise UserError when the config asks for what the model does not have."""
    resolution, multiple = config.data.resolution, family.side_multiple
    if config.data.aspect == "square" and resolution % multiple:
        raise UserError(
            f"data.resolution = {resolution} does not fit the model",
            why=f"its VAE and UNet halve the image until one cell stands for {multiple} pixels",
            fix=f"use a multiple of {multiple}, such as {-(-resolution // multiple) * multiple}",
        )
    if not equal_area(resolution, multiple).sizes:
        raise UserError(
            f"data.resolution = {resolution} is too small for buckets of the model",
            why=f"their sides are multiples of {multiple}",
            fix="raise data.resolution",
        )
    last = family.schedule.num_timesteps - 1
    if config.train.max_timestep > last:
        raise UserError(
            f"train.max_timestep = {config.train.max_timestep} is beyond the model's last timestep",
            why=f"it has {last + 1} timesteps, 0 to {last}",
            fix=f"lower it to at most {last}",
        )


def _check_packages(config: TrainConfig) -> None:
    for wanted, key, package, fix in (
        (config.model.attention == "xformers", 'model.attention = "xformers"', "xformers",
         "pip install 'diffpref[xformers]', or set model.attention = \"sdpa\""),
        (config.train.optimizer == "adamw8bit", 'train.optimizer = "adamw8bit"', "bitsandbytes",
         "pip install 'diffpref[8bit]', or use adamw or adafactor"),
    ):  # fmt: skip
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{key} needs the package {package}", why="it is not installed", fix=fix)


def _check_device(config: TrainConfig) -> None:
    on_cpu = best_device() == "cpu"
    if on_cpu and config.train.mixed_precision == "fp16":
        raise UserError(
            'train.mixed_precision = "fp16" does not work on the CPU',
            why="it has no fp16 kernels for training and no loss scaling",
            fix='use "no" (fastest on most CPUs) or "bf16"',
        )
    if config.model.attention == "xformers" and (on_cpu or not torch.cuda.is_available()):
        raise UserError(
            'model.attention = "xformers" needs an NVIDIA GPU',
            why="its operators are written for CUDA",
            fix='set model.attention = "sdpa"',
        )
    if on_cpu or not torch.cuda.is_available():
        for name in ("tf32", "channels_last", "compile"):
            if getattr(config.train, name):
                log.warning("train.%s has no effect: it is for CUDA, and this run has none", name)


def check_grids(config: TrainConfig, prompts: list[str], device: torch.device) -> None:
    """Score a blank image for each prompt of the grids, before hours of training end in a prompt that an
    evaluator cannot read, or in the misspelt name of one."""
    if config.sampling.evaluators and prompts:
        blank = Image.new("RGB", (config.data.resolution, config.data.resolution))
        for evaluator in grid_evaluators(config.sampling.evaluators, device):
            evaluator.score([blank] * len(prompts), prompts)


def _check_split(config: TrainConfig, world: int) -> None:
    """Uneven splits would weigh pairs unevenly, so they are refused rather than corrected for."""
    batch, micro = config.train.batch_size, config.train.micro_batch
    if batch % world:
        raise UserError(
            f"train.batch_size = {batch} does not divide over {world} processes",
            fix=f"use a multiple of {world}, such as {-(-batch // world) * world}",
        )
    if isinstance(micro, int) and micro and (batch // world) % micro:
        raise UserError(
            f"train.micro_batch = {micro} does not divide the {batch // world} pairs of each process",
            why=f"train.batch_size = {batch} over {world} process(es)",
            fix="choose a divisor, or 0 for all of them at once",
        )
