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
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffpref.engine.base import Engine, Job, Worker, carried
from diffpref.errors import UserError

OBJECT_STORE_BYTES = 256 * 2**20
"""Only numbers of units and rows travel; images are read where they are used."""
CPUS_PER_ACTOR = 2  # one for the model, one for the thread that reads and decodes ahead


def run_ray(job: Job, units: Sequence[int], progress: Callable[[int], object], engine: Engine) -> None:
    """Make the units in Ray actors. Raises UserError as `run_units` says."""
    with _connected(engine) as ray, _settings(ray):
        pool, resources = _resources(ray.cluster_resources(), engine, len(units))
        items = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
        steps = items.map_batches(
            _Actor,
            fn_constructor_args=(job, "num_gpus" in resources),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=pool, max_tasks_in_flight_per_actor=1),
            **resources,
        )
        for step in steps.iter_rows():
            if step["errno"]:
                raise OSError(step["errno"], step["what"], step["why"] or None)
            if step["what"]:
                raise UserError(step["what"], step["why"], step["fix"])
            progress(step["rows"])


@contextlib.contextmanager
def _connected(engine: Engine) -> Iterator[Any]:
    """The package ray, connected; disconnected afterwards if it was not connected before."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it calls its own restarts of actors errors
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the processes of the local engine, not 15
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
    address = os.environ.get("RAY_ADDRESS", "")
    _require_listener(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
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
            f"the Ray cluster {address} cannot be used" if address else "Ray cannot be started",
            str(error).strip().partition("\n")[0],
            "look at RAY_ADDRESS, or use --engine local" if address else "use --engine local",
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise UserError where nothing listens at "host:port" or "ray://host:port": Ray tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # none, or a word such as "auto"
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster at {address}, which RAY_ADDRESS names",
            str(error),
            "start it or unset RAY_ADDRESS; or use --engine local",
        ) from None


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


@contextlib.contextmanager
def _settings(ray: Any) -> Iterator[None]:
    """Ray Data without bars and lists of its own; every step of a worker is told at once, as a block."""
    context = ray.data.DataContext.get_current()
    ours = {"enable_progress_bars": False, "print_on_execution_start": False, "target_max_block_size": 1}
    theirs = {name: getattr(context, name) for name in ours}
    for name, value in ours.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in theirs.items():
            setattr(context, name, value)


class _Actor:
    """Makes one unit a call. Errors that are no bugs come back as rows: Ray would wrap them in its own."""

    def __init__(self, job: Job, on_gpu: bool) -> None:
        self._job, self._device = job, "cuda:0" if on_gpu else ""
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        try:
            self._worker = self._worker or self._job.start(self._device)
            for unit in batch["unit"]:
                for rows in self._worker(int(unit)):
                    yield _step(rows)
        except Exception as error:
            known = carried(error)
            if known is None:
                raise
            yield _step(0, known)


def _step(rows: int, error: UserError | OSError | None = None) -> dict[str, list[Any]]:
    what, why, fix, errno = "", "", "", 0
    if isinstance(error, UserError):
        what, why, fix = error.what, error.why, error.fix
    elif error is not None:
        what, why, errno = str(error.strerror), error.filename or "", error.errno or 0
    return {"rows": [rows], "what": [what], "why": [why], "fix": [fix], "errno": [errno]}
