"""What must hold before anything is loaded: device, precision, processes, batch sizes, packages, threads."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, str_to_bool

from diffpref.config import TrainConfig
from diffpref.errors import UserError
from diffpref.training.tracking import check_trackers

BARRIER_LIMIT = timedelta(hours=12)  # one process may encode, validate or save for long while the others wait


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Check the config against this machine and set up device, precision and processes.

    Raises UserError: fp16 on the CPU, a tracker that is not installed, a launch whose processes do not find
    one another, a batch that does not split evenly.
    """
    check_trackers(config.log)
    _check_precision(config)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        # a second run in this process may differ in precision
        AcceleratorState._reset_state(reset_partial_state=True)
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
    _check_split(config, accelerator.num_processes)
    return accelerator


def _check_precision(config: TrainConfig) -> None:
    on_cpu = str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")) or not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    )
    if on_cpu and config.train.mixed_precision == "fp16":
        raise UserError(
            'train.mixed_precision = "fp16" does not work on the CPU',
            why="it has no fp16 kernels for training and no loss scaling",
            fix='use "no" (fastest on most CPUs) or "bf16"',
        )


def _check_split(config: TrainConfig, world: int) -> None:
    """Uneven splits would weigh pairs unevenly, so they are refused rather than corrected for."""
    batch, micro = config.train.batch_size, config.train.micro_batch
    if batch % world:
        raise UserError(
            f"train.batch_size = {batch} does not divide over {world} processes",
            fix=f"use a multiple of {world}, such as {-(-batch // world) * world}",
        )
    if micro and (batch // world) % micro:
        raise UserError(
            f"train.micro_batch = {micro} does not divide the {batch // world} pairs of each process",
            why=f"train.batch_size = {batch} over {world} process(es)",
            fix="choose a divisor, or 0 for all of them at once",
        )
