"""torchvision beside a torch that it was not built for.

Its wheel on the public registry is built for CUDA. Beside a CPU build of torch its operators do not load,
its import fails, and the imports of transformers, diffusers and open_clip, which use it when it is there,
fail with it. Nothing here uses those operators, so two declarations are enough to make all of them work.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)

_OPERATORS = ("nms", "qnms")
_declared: list[Any] = []  # an operator lives as long as its library object


def mend_mismatch() -> None:
    """`mend_torchvision` where the installed versions call for it; neither is imported to tell."""
    if importlib.util.find_spec("torchvision") is None:
        return
    from importlib import metadata  # it takes as long as all that help needs

    try:
        torch, torchvision = (metadata.version(name) for name in ("torch", "torchvision"))
    except metadata.PackageNotFoundError:
        return
    if torch.endswith("+cpu") and not torchvision.endswith("+cpu"):
        mend_torchvision()


def mend_torchvision() -> None:
    """Make ``import torchvision`` work beside a CPU build of torch, if it is installed and does not.

    Its transforms work then; non-maximum suppression and its image decoders do not. Does nothing where
    torchvision is missing, already imported, or where torch is built for a GPU. Call it before importing
    anything that imports torchvision.
    """
    import torch  # here, since most commands that only look or help need none of it

    if torch.version.cuda or torch.version.hip or "torchvision" in sys.modules:
        return
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        logger.debug("declaring torchvision's operators: %s", error)
        _forget("torchvision")
        _declare()
        importlib.import_module("torchvision")


def _declare() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


def _forget(package: str) -> None:
    """Drop the modules that a failed import has left behind."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
