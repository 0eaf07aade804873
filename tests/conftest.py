"""Settings that must stand before torch is imported: one thread a process, no network."""

import os

os.environ.update(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"
)

import logging

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster():
    """Two CPU workers on this machine, one cluster for all tests that use it: to start it takes seconds."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()
