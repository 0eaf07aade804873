"""Reading the latent and text cache: memory-mapped, so a run of any size starts at once and shares the page
cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


class LatentCache:
    """A finished cache. Pairs are numbered 0..len-1, unusable ones left out; ids stay those of the table."""

    def __init__(self, latents: Path, text: Path) -> None:
        self._latents, self._text = latents, text
        self.manifest: dict[str, Any] = json.loads((latents / "manifest.json").read_text())
        self.text_manifest: dict[str, Any] = json.loads((text / "manifest.json").read_text())
        self._starts = np.cumsum([0, *self.manifest["shards"]])
        self._shards: dict[tuple[Path, int], dict[str, Tensor]] = {}
        shards = [self._open(latents, number) for number in range(len(self.manifest["shards"]))]
        self.pair_ids: list[int] = torch.cat([shard["pair_id"] for shard in shards]).tolist()
        index = load_file(text / "index.safetensors")
        rows = torch.cat([shard["index"] for shard in shards])
        self._captions = torch.stack([index["winner"][rows], index["loser"][rows]], dim=1)
        self._shard_captions = len(next(iter(self._open(text, 0).values())))

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes what the cache holds."""
        return f"{self.manifest['key_hash'][:32]}{self.text_manifest['key_hash'][:32]}"

    def latents(self, pairs: Sequence[int], flips: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance of pairs, each fp32 [B, 2, C, h, w]: winner first, unscaled.

        flips: which pairs to take mirrored; the cache must have been built with random_flip.
        """
        mirrored = flips if flips is not None else [False] * len(pairs)
        means, logvars = [], []
        for pair, flip in zip(pairs, mirrored, strict=True):
            shard, row = self._locate(pair)
            means.append(shard["mean"][row, :, int(flip)])
            logvars.append(shard["logvar"][row, :, int(flip)])
        return torch.stack(means), torch.stack(logvars)

    def captions(self, pairs: Sequence[int]) -> Tensor:
        """Caption numbers of pairs, int64 [B, 2]: winner's and loser's. Number 0 is the empty prompt."""
        return self._captions[torch.as_tensor(pairs)]

    def conditioning(self, captions: Sequence[int]) -> dict[str, Tensor]:
        """What the text encoder made of captions, by name, each [B, ...]."""
        found = [divmod(number, self._shard_captions) for number in captions]
        shards = [(self._open(self._text, shard), row) for shard, row in found]
        return {name: torch.stack([shard[name][row] for shard, row in shards]) for name in shards[0][0]}

    def _locate(self, pair: int) -> tuple[dict[str, Tensor], int]:
        number = int(np.searchsorted(self._starts, pair, side="right")) - 1
        return self._open(self._latents, number), pair - int(self._starts[number])

    def _open(self, folder: Path, number: int) -> dict[str, Tensor]:
        key = (folder, number)
        if key not in self._shards:
            # maps the file: pages are read when touched
            self._shards[key] = load_file(folder / f"{number:05d}.safetensors")
        return self._shards[key]
