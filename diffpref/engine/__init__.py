"""Units of work (parts, shards) made by one process, several, or a Ray cluster: the same files from each.

A job makes unit n by itself, whole or not at all, and nothing of a unit depends on who makes it or when. So
the engines differ in speed alone, and a run that was killed goes on with the units that are missing.

    run_units(job, missing, bar.update, Engine("ray", workers=8, on_device=True))

`ahead` reads and decodes the next batches in a thread while a model works on the present one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffpref.engine.base import ENGINES, Engine, Job, Worker, require_engine, require_shard
from diffpref.engine.local import run_local
from diffpref.engine.prefetch import ahead

__all__ = ["ENGINES", "Engine", "Job", "Worker", "ahead", "require_engine", "require_shard", "run_units"]


def run_units(
    job: Job, units: Sequence[int], progress: Callable[[int], object], engine: Engine | None = None
) -> None:
    """Make `units`, in this order as far as there is one; progress(n) is called for n more rows done.

    Returns when all are made. Raises UserError or OSError: an error of the job (what is under way elsewhere
    ends, and its files stay); UserError: a worker that died, Ray missing or not to be reached.
    """
    engine = engine or Engine()
    if not units:
        return
    if engine.name == "ray":
        from diffpref.engine.ray_data import run_ray  # the package is optional and slow to import

        run_ray(job, units, progress, engine)
    else:
        run_local(job, units, progress, engine)
