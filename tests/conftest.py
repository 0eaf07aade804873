"""Settings that must stand before torch is imported: one thread a process, no network."""

import os

os.environ.update(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"
)

import torch

torch.set_num_threads(1)
