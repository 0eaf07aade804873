"""Tensors on their way to a device, without anybody waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` on `device`, in `dtype` where one is given.

    To CUDA it goes from pinned memory, so that the host does not wait, and is cast there: a cast in the same
    call would be made on the host.
    """
    cuda = device.type == "cuda"
    if cuda and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=cuda).to(dtype or tensor.dtype)
