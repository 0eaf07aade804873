"""The frozen reference model: a copy of the base, or the policy with its adapters switched off."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn


class Reference(Protocol):
    def model(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The reference denoiser, for use inside the `with` block only."""
        ...


class FrozenCopy:
    """For full fine-tuning. Made before the first step; never saved, since the base model's folder holds
    it."""

    def __init__(self, unet: nn.Module) -> None:
        self._unet = copy.deepcopy(unet).requires_grad_(False)

    @contextlib.contextmanager
    def model(self) -> Iterator[nn.Module]:
        yield self._unet


class AdaptersOff:
    """For LoRA: the policy's own UNet without its adapters, at no memory."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet

    @contextlib.contextmanager
    def model(self) -> Iterator[nn.Module]:
        self._unet.disable_adapters()
        try:
            yield self._unet
        finally:
            self._unet.enable_adapters()
