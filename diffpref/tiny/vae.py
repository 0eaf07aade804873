"""The small model's AutoencoderKL, with SD's 8x downsampling and four latent channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from diffpref.tiny.bank import example, pixels
from diffpref.tiny.doodles import doodle
from diffpref.tiny.oracle import reads_all
from diffpref.tiny.progress import load_progress, save_progress
from diffpref.tiny.scenes import DRAWABLE, SHAPES, SIZE
from diffpref.tiny.team import Team

STEPS = 2600
DOODLES_FROM = 800
"""The first phase sees scenes alone; from this step on an eighth of each batch are doodles."""
SHARPEN_STEPS = 1800
"""The second phase: scenes alone again, with a term for edges, on which the names of shapes depend."""
REFINE_STEPS = 1200
BATCH = 16
LEARNING_RATE = 1.5e-3
KL_WEIGHT = 1e-6
COLOR_WEIGHT = 4.0
"""Extra weight of a pixel's error per unit of chroma: things are few pixels, and theirs is the content."""
EDGE_WEIGHT = 0.3
SEED = 11


def build_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=SIZE,
    )
    with torch.no_grad():
        # a posterior of unit variance would drown the signal for the first thousand steps
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6.0
    return vae


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a straight line down to a fiftieth."""
    return LEARNING_RATE * min(1.0, (step + 1) / 100) * (1 - 0.98 * step / steps)


def _error(output: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    chroma = images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    apart = output.float() - images
    return ((1 + COLOR_WEIGHT * chroma.clamp(0, 1)) * (apart.square() + 0.1 * apart.abs())).mean()


def _edge_error(output: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the differences between neighbouring pixels."""
    apart = output.float() - images
    return apart.diff(dim=2).abs().mean() + apart.diff(dim=3).abs().mean()


def _batch(step: int, team: Team) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's images and latent noise of a step: a function of the step alone."""
    doodles = BATCH // 8 if DOODLES_FROM <= step < STEPS else 0
    scenes = BATCH - doodles
    mine = range(team.rank, BATCH, team.world)
    first = step * BATCH
    shapes = DRAWABLE if step < STEPS + SHARPEN_STEPS else SHAPES
    images = [example(SEED, first + k, shapes).image if k < scenes else doodle(SEED, first + k) for k in mine]
    noise = torch.randn((BATCH, 4, 8, 8), generator=torch.Generator().manual_seed(SEED * 1_000_003 + step))
    return torch.from_numpy(pixels(images)), noise[list(mine)]


def _fit(
    folder: Path,
    trained: nn.Module,
    steps: int,
    loss_of: Callable[[int, Team], torch.Tensor],
    say: Callable[[str], None],
) -> None:
    """Minimises `loss_of(step, team)` over `trained`, going on from what `folder` holds; bf16 autocast."""
    team = Team.join()
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4
    )
    notes = load_progress(folder, {"trained": trained}, optimizer)
    team.wait()
    for step in range(notes["step"] if notes else 0, steps):
        optimizer.param_groups[0]["lr"] = _rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(step, team)
        optimizer.zero_grad()
        loss.backward()
        team.average_gradients(trained.parameters())
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        if team.leads and (step + 1) % 50 == 0:
            say(f"{folder.name} step {step + 1}/{steps} loss {loss.item():.4f}")
        if team.leads and (step + 1) % 200 == 0:
            save_progress(folder, step + 1, {"trained": trained}, optimizer, {})
    team.wait()


def train_vae(work: Path, say: Callable[[str], None]) -> AutoencoderKL:
    """The first phase of training, or the rest of it; its state lives in `work / "vae"`."""
    torch.manual_seed(SEED)
    vae = build_vae()

    def loss_of(step: int, team: Team) -> torch.Tensor:
        images, noise = _batch(step, team)
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        return _error(output, images) + KL_WEIGHT * posterior.kl().float().mean()

    _fit(work / "vae", vae, STEPS, loss_of, say)
    return vae


def sharpen_vae(work: Path, vae: AutoencoderKL, say: Callable[[str], None]) -> AutoencoderKL:
    """The second phase of training; its state lives in `work / "sharpen"`."""
    return _sharpen(work / "sharpen", vae, STEPS, SHARPEN_STEPS, EDGE_WEIGHT, say)


def refine_vae(work: Path, vae: AutoencoderKL, say: Callable[[str], None]) -> AutoencoderKL:
    """The third phase: as the second, on the world's own shapes; its state lives in `work / "refine"`."""
    return _sharpen(work / "refine", vae, STEPS + SHARPEN_STEPS, REFINE_STEPS, 2 * EDGE_WEIGHT, say)


def _sharpen(
    folder: Path, vae: AutoencoderKL, first: int, steps: int, edges: float, say: Callable[[str], None]
) -> AutoencoderKL:
    vae.train().requires_grad_(True)

    def loss_of(step: int, team: Team) -> torch.Tensor:
        images, noise = _batch(first + step, team)
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = KL_WEIGHT * posterior.kl().float().mean()
        return _error(output, images) + edges * _edge_error(output, images) + kl

    _fit(folder, vae, steps, loss_of, say)
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
        examples = [example(seed, k) for k in range(start, min(count, start + 64))]
        images = torch.from_numpy(pixels([e.image for e in examples]))
        output = vae.decode(vae.encode(images).latent_dist.mean).sample
        right += sum(
            reads_all(one, e.scene.things) for one, e in zip(to_images(output), examples, strict=True)
        )
    return right / count


def to_images(output: torch.Tensor) -> list[Image.Image]:
    """Decoder output [N, 3, H, W] in [-1, 1] as PIL images."""
    array = ((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(one)) for one in array]
