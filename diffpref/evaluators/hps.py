"""HPS v2 and v2.1 (X. Wu et al., *Human Preference Score v2*, arXiv:2306.09341)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from diffpref.evaluators.agreement import Agreement
from diffpref.evaluators.base import Runtime
from diffpref.evaluators.checkpoints import find_file
from diffpref.evaluators.clip import Clip, Network
from diffpref.evaluators.loading import load_checkpoint_network

REPOSITORY = "xswu/HPSv2"
ARCHITECTURE = "ViT-H-14"
FILES = {"v2": "HPS_v2_compressed", "v2.1": "HPS_v2.1_compressed"}

Version = Literal["v2", "v2.1"]


def load(runtime: Runtime, version: Version, antialias: bool) -> Agreement:
    """Cosine of a CLIP ViT-H/14 tuned on human choices, through open_clip.

    Weights: the published ``.pt`` file, its safetensors copy, a folder with either, or a hub id.

    antialias: whether images are filtered before they are made smaller. The package leaves it to torchvision,
    which did not filter tensors before 0.17 (2023) and does since: two scores that do not compare.

    Raises:
        UserError: open_clip or the weights are missing; the weights do not fit.
    """
    stem = FILES[version]
    names = [f"{stem}.safetensors", f"{stem}.pt"] if runtime.weights else [f"{stem}.pt"]
    path = find_file(runtime.weights, names, REPOSITORY, f"weights of hps-{version}")
    network = load_checkpoint_network(path, ARCHITECTURE, runtime)
    return of_network(network, version, antialias, runtime.batch)


def of_network(network: Network, version: Version, antialias: bool, batch: int) -> Agreement:
    """HPS as this network gives it."""
    pixels = replace(network.pixels, fit="pad" if antialias else "pad, aliased", rgb="first")
    filtered = "antialiased resizing" if antialias else "resizing without antialiasing"
    return Agreement(
        name=f"hps-{version}" if antialias else f"hps-{version}-aliased",
        computation=f"{version}, {filtered}",
        scale="cosine of image and prompt, without a logit scale (published tables print it x 100)",
        label=f"HPS {version}" if antialias else f"HPS {version} (aliased)",
        meaning=f"preference learned from the HPD v2 choices, {filtered}",
        clip=Clip(network, pixels, network.text, batch),
        rescale=lambda cosines: cosines,
    )
