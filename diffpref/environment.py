"""What this machine and installation offer: what `diffpref env` prints and manifests record."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

from diffpref import __version__, threads

CORE = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors", "huggingface_hub",
    "numpy", "pyarrow", "pillow", "scipy", "tensorboard",
)  # fmt: skip
OPTIONAL = {
    "open_clip_torch": ("CLIP-based evaluators", "pip install 'diffpref[eval]'"),
    "xformers": ("its attention kernels on NVIDIA GPUs", "pip install 'diffpref[xformers]'"),
    "bitsandbytes": ("the 8-bit optimizer", "pip install 'diffpref[8bit]'"),
    "ray": ("--engine ray", "pip install 'diffpref[ray]'"),
    "wandb": ("logging to Weights & Biases", "pip install 'diffpref[wandb]'"),
}
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM",
)  # fmt: skip
GIB = 1024**3


def version_of(package: str) -> str:
    """Installed version of a distribution, or "" when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """Versions for manifests: Python, diffpref and the core packages."""
    found = {name: version_of(name) for name in CORE}
    return {"python": platform.python_version(), "diffpref": __version__} | found


def accelerators() -> list[dict[str, Any]]:
    """Each device beside the CPU that torch can use: device, name, memory_gib (None where unknown)."""
    import torch

    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = round(properties.total_memory / GIB, 1)
            found.append({"device": f"cuda:{index}", "name": properties.name, "memory_gib": memory})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": platform.machine(), "memory_gib": None})
    return found


def usable_cores() -> int:
    """CPU cores that this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> str:
    """Everything that a bug report needs, as aligned text."""
    sections = {
        "versions": {**versions(), "platform": platform.platform(), "interpreter": sys.executable},
        "devices": _devices(),
        "threads": _threads(),
        "optional": _optional(),
    }
    width = max(len(key) for rows in sections.values() for key in rows) + 2
    blocks = []
    for title, rows in sections.items():
        blocks.append(
            "\n".join([title, *(f"  {key:<{width}}{value}".rstrip() for key, value in rows.items())])
        )
    return "\n\n".join(blocks + _advice())


def _devices() -> dict[str, str]:
    processor = platform.processor() or platform.machine()
    rows = {"cpu": f"{processor}, {usable_cores()} of {os.cpu_count()} cores usable"}
    for entry in accelerators():
        memory = f", {entry['memory_gib']} GiB" if entry["memory_gib"] is not None else ""
        rows[entry["device"]] = entry["name"] + memory
    return rows


def _threads() -> dict[str, str]:
    import torch

    rows = {
        "torch": f"{torch.get_num_threads()} in an operator, {torch.get_num_interop_threads()} between them"
    }
    return rows | {name: threads.described(name) for name in THREAD_VARIABLES}


def _optional() -> dict[str, str]:
    return {
        name: version_of(name) or f"not installed: {purpose}; {command}"
        for name, (purpose, command) in OPTIONAL.items()
    }


def _advice() -> list[str]:
    """What is wrong with this environment and how to put it right; empty when nothing is."""
    import torch

    advice = []
    if torch.version.cuda is None and torch.version.hip is None and _has_nvidia_driver():
        advice.append(
            "This machine has an NVIDIA GPU, but torch is built for the CPU.\n"
            f"  pip install --force-reinstall 'torch==={torch.__version__.partition('+')[0]}'"
        )
    if torch.version.cuda is None and importlib.util.find_spec("torchvision") is not None:
        vision = version_of("torchvision")
        if "+cpu" not in vision and sys.platform == "linux":
            advice.append(
                f"torchvision {vision} may be a CUDA build beside a CPU build of torch: "
                "diffusers then fails to import.\n"
                "  pip uninstall torchvision"
            )
    return [f"note: {text}" for text in advice]


def _has_nvidia_driver() -> bool:
    return any(os.path.exists(path) for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl"))
