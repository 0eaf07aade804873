"""Pairs and caches to measure on: real ones, or noise of the right shape."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from diffpref.data.cached import EncodedPairs, LatentCache, TextCache, latent_key
from diffpref.data.tensors import save_tensors
from diffpref.errors import UserError
from diffpref.paths import resolve_existing, sha256_file

COLUMNS = ["caption", "jpg_0", "jpg_1", "label_0"]


def take_pairs(spec: str, count: int) -> list[dict[str, Any]]:
    """The first pairs with a preference and different images. Raises UserError when there are too few."""
    table = pq.read_table(resolve_existing(spec, "pairs"), columns=COLUMNS)
    rows = [row for row in table.to_pylist() if row["label_0"] in (0, 1) and row["jpg_0"] != row["jpg_1"]]
    if len(rows) < count:
        raise UserError(f"{spec} has only {len(rows)} pairs with a preference", fix=f"--count {len(rows)}")
    return rows[:count]


def noise_pairs(count: int, side: int) -> list[dict[str, Any]]:
    """Pairs of JPEGs of noise, for measuring without data."""
    generator = np.random.default_rng(0)
    return [
        {
            "caption": f"prompt {number % 8}",
            "jpg_0": noise_jpeg(generator, side),
            "jpg_1": noise_jpeg(generator, side),
            "label_0": float(number % 2),
        }
        for number in range(count)
    ]


def noise_jpeg(generator: np.random.Generator, side: int) -> bytes:
    """Coarse noise with a fine grain: about as many bytes as a photograph of that side, 1.5 bits a pixel."""
    coarse = Image.fromarray(generator.integers(0, 256, (max(2, side // 16),) * 2 + (3,), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BILINEAR), np.float32)
    grain = generator.normal(0, 2.5, (side, side, 1)).astype(np.float32)
    stream = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def synthetic_cache(
    folder: Path, pairs: int, side: int, latent: tuple[int, int, int], text: Mapping[str, tuple[int, ...]]
) -> EncodedPairs:
    """A cache as `diffpref encode` leaves it, of noise: read by the package's own readers.

    latent: (C, h, w). text: shape of what the encoders make of one caption, by name. Every pair has a caption
    of its own; caption 0 is the empty prompt.
    """
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([side, side])
    numbers = torch.arange(pairs)
    latents = {
        **{name: numbers.clone() for name in ("pair_id", "index", "row")},  # a file shares no storage
        "size": size.expand(pairs, 2),
        "original": size.expand(pairs, 2, 2),
        "crop": torch.zeros(pairs, 2, 1, 2, dtype=torch.int64),
        latent_key("mean", (side, side)): torch.randn(pairs, 2, 1, *latent, generator=generator),
        latent_key("logvar", (side, side)): torch.full((pairs, 2, 1, *latent), -8.0),
    }
    save_tensors(folder / "latents" / "00000.safetensors", latents)
    _manifest(folder / "latents", shards=[pairs], bad=0, identical=0, first_bad=[])
    captions = {
        name: torch.randn(pairs + 1, *shape, generator=generator) for name, shape in sorted(text.items())
    }
    save_tensors(folder / "text" / "00000.safetensors", captions)
    index = {"winner": numbers + 1, "loser": numbers + 1}
    save_tensors(folder / "text" / "index.safetensors", index)
    _manifest(folder / "text", count=pairs + 1, truncated=0, max_tokens=77)
    return EncodedPairs(LatentCache(folder / "latents"), TextCache(folder / "text"))


def _manifest(folder: Path, **values: Any) -> None:
    files = {path.name: {"sha256": sha256_file(path)} for path in folder.glob("*.safetensors")}
    (folder / "manifest.json").write_text(json.dumps({"key_hash": "0" * 64, "files": files, **values}))
