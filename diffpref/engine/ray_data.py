"""The Ray engine: units as a Ray Data stream through a pool of actors, on a cluster or on this machine.

A cluster is used when RAY_ADDRESS names one (or `ray job submit` started us); otherwise one is started here
and ended with the run. On a cluster, diffpref must be installed on each node, and all paths must be on a file
system that the nodes share.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffpref.engine.base import Engine, Job
from diffpref.errors import UserError

OBJECT_STORE_BYTES = 256 * 2**20
"""Only numbers of units and rows travel; images are read where they are used."""
CPUS_PER_ACTOR = 2  # one for the model, one for the thread that reads and decodes ahead
_POLL = 0.5


def run_ray(job: Job, units: Sequence[int], progress: Callable[[int], object], engine: Engine) -> None:
    """Make the units in Ray actors. Raises UserError as `run_units` says."""
    with _connected(engine) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        counter = ray.remote(num_cpus=0)(_Counter).remote()
        pool, resources = _resources(ray.cluster_resources(), engine, len(units))
        made = ray.data.from_items(
            [{"unit": unit} for unit in units], override_num_blocks=len(units)
        ).map_batches(
            _Actor,
            fn_constructor_args=(job, counter, bool(resources.get("num_gpus"))),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=pool, max_tasks_in_flight_per_actor=1),
            **resources,
        )
        with _reported(ray, counter, progress):
            for row in made.iter_rows():
                if row["what"]:
                    raise UserError(row["what"], row["why"], row["fix"])


@contextlib.contextmanager
def _connected(engine: Engine) -> Iterator[Any]:
    """The package ray, connected; disconnected afterwards if it was not connected before."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # CPU actors leave CUDA alone, says Ray 3
    try:
        ray: Any = importlib.import_module("ray")
        importlib.import_module("ray.data")  # it needs more packages than ray itself
    except ImportError as error:
        raise UserError(
            "--engine ray needs Ray Data", str(error), "pip install 'diffpref[ray]', or use --engine local"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            ray.init(
                include_dashboard=False,
                num_cpus=max(engine.workers, os.cpu_count() or 1),
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            "Ray cannot be started" if not os.environ.get("RAY_ADDRESS") else "no Ray cluster to be reached",
            str(error).strip().partition("\n")[0],
            "look at RAY_ADDRESS, or use --engine local",
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


def _resources(cluster: dict[str, float], engine: Engine, units: int) -> tuple[int, dict[str, float]]:
    """The number of actors, and what each takes: a GPU or a share of one, and CPUs to read and decode."""
    gpus = int(cluster.get("GPU", 0)) if engine.on_device else 0
    cpus = cluster.get("CPU", 1)
    pool = min(engine.workers or gpus or int(cpus), units)
    share = cpus / pool
    resources = {"num_cpus": float(min(int(share), CPUS_PER_ACTOR)) if share >= 1 else share}
    if gpus:
        resources["num_gpus"] = 1 if pool <= gpus else gpus / pool
    return pool, resources


class _Counter:
    """An actor that sums the rows done since it was last asked."""

    def __init__(self) -> None:
        self._rows = 0

    def add(self, rows: int) -> None:
        self._rows += rows

    def take(self) -> int:
        rows, self._rows = self._rows, 0
        return rows


@contextlib.contextmanager
def _reported(ray: Any, counter: Any, progress: Callable[[int], object]) -> Iterator[None]:
    """Hand the counter's rows to `progress` from a thread while the body waits for units."""
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(_POLL):
            progress(ray.get(counter.take.remote()))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    progress(ray.get(counter.take.remote()))


class _Actor:
    """Makes one unit a call. A user's mistake comes back as a row: Ray would wrap it in its own errors."""

    def __init__(self, job: Job, counter: Any, on_gpu: bool) -> None:
        self._job, self._counter, self._device = job, counter, "cuda:0" if on_gpu else ""
        self._worker: Callable[[int], Iterator[int]] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        mistake = UserError("")
        try:
            self._worker = self._worker or self._job.start(self._device)
            for unit in batch["unit"]:
                for rows in self._worker(int(unit)):
                    self._counter.add.remote(rows)
        except UserError as error:
            mistake = error
        return {"what": [mistake.what], "why": [mistake.why], "fix": [mistake.fix]}
