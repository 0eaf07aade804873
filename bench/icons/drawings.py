"""The drawings as the measurements see them: at the generated images' size, through the model's autoencoder.

Whatever a Stable Diffusion model generates comes out of its VAE, slightly blurred. A judge trained on sharp
files would tell "came out of a VAE" from "did not", not one style from the other. So every drawing, of
training and of held-out pairs alike, is encoded and decoded before it is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from diffpref.data.images import as_tensor, decode_image, to_pixels
from diffpref.data.pairs import PreferencePair, open_pairs
from diffpref.errors import UserError
from diffpref.image_tables import open_images
from diffpref.paths import resolve_existing

SIDE = 64
BATCH = 64


def load_pairs(path: Path) -> list[PreferencePair]:
    """All pairs of a file; the winner is the flat drawing, the loser the shaded one."""
    table = open_pairs(path)
    return [table.load(index) for index in range(len(table))]


def load_vae(model: str) -> AutoencoderKL:
    """The autoencoder of a pipeline folder. Fine-tuning leaves it alone: base and aligned models share it."""
    vae = AutoencoderKL.from_pretrained(resolve_existing(model, "model"), subfolder="vae")
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def through_vae(images: Sequence[Image.Image], vae: AutoencoderKL) -> Tensor:
    """uint8 [N, 3, SIDE, SIDE]: resized as for training, encoded (the posterior's mean), decoded, rounded."""
    parts = []
    for start in range(0, len(images), BATCH):
        pixels = as_tensor([to_pixels(image, (SIDE, SIDE)) for image in images[start : start + BATCH]])
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        parts.append(((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(parts)


def both_styles(pairs: Sequence[PreferencePair], vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """The winners' and the losers' drawings as the measurements see them."""
    winners = through_vae([pair.winner_image for pair in pairs], vae)
    return winners, through_vae([pair.loser_image for pair in pairs], vae)


def load_generated(folder: Path) -> dict[str, Tensor]:
    """Prompt -> uint8 [3, SIDE, SIDE] of a folder that `diffpref generate` wrote with one seed per prompt."""
    found: dict[str, Tensor] = {}
    for row in open_images(folder):
        image = decode_image(row.read())
        if image.size != (SIDE, SIDE):
            raise UserError(f"{row.where} is {image.width}x{image.height}", fix="draw the suite icons")
        if row.prompt in found:
            raise UserError(f"{folder} has several images of {row.prompt!r}", fix="use a suite with one seed")
        found[row.prompt] = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    return found
