"""Stage 1 of the small model: an AutoencoderKL with SD's 8x downsampling and four latent channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from diffpref.tiny.bank import example, pixels
from diffpref.tiny.oracle import parse_image
from diffpref.tiny.progress import load_progress, save_progress
from diffpref.tiny.scenes import SIZE

STEPS = 2600
BATCH = 8
LEARNING_RATE = 1e-3
KL_WEIGHT = 1e-6
COLOR_WEIGHT = 4.0
"""Extra weight of a pixel's error per unit of chroma: things are few pixels, and theirs is the content."""
SEED = 11


def build_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )
    with torch.no_grad():
        # a posterior of unit variance would drown the signal for the first thousand steps
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6.0
    return vae


def _rate(step: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    return LEARNING_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))


def _error(output: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    chroma = images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    apart = output - images
    return ((1 + COLOR_WEIGHT * chroma.clamp(0, 1)) * (apart.square() + 0.1 * apart.abs())).mean()


def _batch(step: int) -> torch.Tensor:
    images = [example(SEED, step * BATCH + k).image for k in range(BATCH)]
    return torch.from_numpy(pixels(images))


def train_vae(work: Path, say: Callable[[str], None]) -> AutoencoderKL:
    """Trains (or finishes training) the autoencoder; its state lives in `work / "vae"`."""
    torch.manual_seed(SEED)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    notes = load_progress(work / "vae", {"vae": vae}, optimizer)
    for step in range(notes["step"] if notes else 0, STEPS):
        optimizer.param_groups[0]["lr"] = _rate(step)
        torch.manual_seed(SEED * 1_000_003 + step)
        images = _batch(step)
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.sample()).sample
        loss = _error(output, images) + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            say(f"vae step {step + 1}/{STEPS} loss {loss.item():.4f}")
        if (step + 1) % 200 == 0:
            save_progress(work / "vae", step + 1, {"vae": vae}, optimizer, {})
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=_unit_scale(vae))
    return vae


@torch.no_grad()
def _unit_scale(vae: AutoencoderKL) -> float:
    """The factor that gives latents unit variance (SD's `scaling_factor`)."""
    images = torch.from_numpy(pixels([example(SEED + 1, k).image for k in range(512)]))
    means = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    return round(1 / float(means.std()), 4)


@torch.no_grad()
def reconstruction_accuracy(vae: AutoencoderKL, count: int, seed: int = SEED + 2) -> float:
    """Share of `count` reconstructions in which the oracle reads every thing of the scene."""
    right = 0
    for start in range(0, count, 64):
        scenes = [example(seed, k) for k in range(start, min(count, start + 64))]
        images = torch.from_numpy(pixels([s.image for s in scenes]))
        output = vae.decode(vae.encode(images).latent_dist.mean).sample
        for one, scene in zip(to_images(output), scenes, strict=True):
            seen = sorted((t.shape, t.color) for t in parse_image(one).things)
            right += seen == sorted((t.shape, t.color) for t in scene.scene.things)
    return right / count


def to_images(output: torch.Tensor) -> list:  # type: ignore[type-arg]
    """Decoder output [N, 3, H, W] in [-1, 1] as PIL images."""
    from PIL import Image

    array = ((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(one)) for one in array]
