"""Settings that must stand before torch is imported: one thread a process, no network."""

import os

os.environ.update(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"
)

import logging

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def fetched(monkeypatch):
    """Shapes of the tensors that are taken to the host from now on."""
    import torch

    shapes: list[torch.Size] = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: shapes.append(self.shape) or cpu(self))
    return shapes


@pytest.fixture(scope="session")
def ray_cluster():
    """Two CPU workers on this machine, one cluster for all tests that use it: to start it takes seconds."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()
