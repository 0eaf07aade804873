"""Reading the latent and text cache: memory-mapped, so a run of any size starts at once and shares the page
cache."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffpref.data.buckets import Size
from diffpref.errors import UserError
from diffpref.paths import sha256_file

MANIFEST, INDEX = "manifest.json", "index.safetensors"
REPAIR = "remove that file, and the same command, or `diffpref encode`, makes it anew and no other"
Place = tuple[float, float]
NO_FLIP = (False, False)


@dataclass(frozen=True)
class LatentPairs:
    """B pairs of one size, winner first. mean, logvar: the VAE's posterior, unscaled, fp32 [B, 2, C, h, w].

    original, crop: int64 [B, 2, 2], each image's (height, width) before resizing and its crop's (top, left).
    size: (height, width) of the crop in pixels, the same for all.
    """

    mean: Tensor
    logvar: Tensor
    original: Tensor
    crop: Tensor
    size: Size


class Latents(Protocol):
    """Where latents of pairs come from. Pairs are numbered 0..len-1, unusable ones left out."""

    pair_ids: list[int]  # stable ids, those of the table
    rows: Tensor  # int64: position of each pair in the table
    sizes: Tensor  # int64 [pairs, 2]: (height, width) that each is trained at
    key_hash: str  # changes with anything that changes the latents
    manifest: dict[str, Any]  # of the cache on disk; counts of bad rows

    def read(
        self, pairs: Sequence[int], flips: Sequence[tuple[bool, bool]], places: Sequence[Place] | None
    ) -> LatentPairs:
        """Pairs of one size. flips: whether the winner, the loser is mirrored. places: of the crops, for live
        latents."""
        ...


class EncodedPairs:
    """Latents and text of a set of pairs: all that training sees of them."""

    def __init__(self, latents: Latents, text: TextCache) -> None:
        self._latents, self._text = latents, text
        self.pair_ids, self.sizes = latents.pair_ids, latents.sizes
        self.manifest, self.text_manifest = latents.manifest, text.manifest

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes what training sees."""
        return f"{self._latents.key_hash[:32]}{self._text.manifest['key_hash'][:32]}"

    def latents(
        self,
        pairs: Sequence[int],
        flips: Sequence[tuple[bool, bool]] | None = None,
        places: Sequence[Place] | None = None,
    ) -> LatentPairs:
        """Pairs of one size; flips need a cache that was built with data.flip, places live latents."""
        return self._latents.read(pairs, flips if flips is not None else [NO_FLIP] * len(pairs), places)

    def captions(self, pairs: Sequence[int]) -> Tensor:
        """Caption numbers of pairs, int64 [B, 2]: winner's and loser's. Number 0 is the empty prompt."""
        return self._text.captions(self._latents.rows[torch.as_tensor(pairs)])

    def conditioning(self, captions: Sequence[int]) -> dict[str, Tensor]:
        """What the text encoder made of captions, by name, each [B, ...]."""
        return self._text.conditioning(captions)


class LatentCache:
    """Latents on disk. Implements `Latents`."""

    def __init__(self, folder: Path) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        self._shards = _Shards(folder, self.manifest["files"])
        self.key_hash = str(self.manifest["key_hash"])
        self._starts = np.cumsum([0, *self.manifest["shards"]])
        shards = [self._shards.mapped(number) for number in range(len(self.manifest["shards"]))]
        self.pair_ids: list[int] = torch.cat([shard["pair_id"] for shard in shards]).tolist()
        self.rows = torch.cat([shard["index"] for shard in shards])
        self.sizes = torch.cat([shard["size"] for shard in shards])

    def read(
        self, pairs: Sequence[int], flips: Sequence[tuple[bool, bool]], places: Sequence[Place] | None
    ) -> LatentPairs:
        height, width = self.sizes[pairs[0]].tolist()
        values: dict[str, list[Tensor]] = {"mean": [], "logvar": [], "original": [], "crop": []}
        for pair, sides in zip(pairs, flips, strict=True):
            shard, number = self._locate(pair)
            row, mirrored = int(shard["row"][number]), [int(flip) for flip in sides]
            for name in ("mean", "logvar"):
                stored = shard[latent_key(name, (height, width))]
                values[name].append(stored[row, [0, 1], mirrored].float())
            values["original"].append(shard["original"][number])
            values["crop"].append(shard["crop"][number, [0, 1], mirrored])
        return LatentPairs(**{name: torch.stack(rows) for name, rows in values.items()}, size=(height, width))

    def _locate(self, pair: int) -> tuple[dict[str, Tensor], int]:
        number = int(np.searchsorted(self._starts, pair, side="right")) - 1
        return self._shards.open(number), pair - int(self._starts[number])


class TextCache:
    """What the text encoder made of every caption, once."""

    def __init__(self, folder: Path) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        self._shards = _Shards(folder, self.manifest["files"])
        check_digest(folder / INDEX, self.manifest["files"])
        index = open_tensors(folder / INDEX)
        self._numbers = torch.stack([index["winner"], index["loser"]], dim=1)
        self._shard_captions = len(next(iter(self._shards.mapped(0).values())))

    def captions(self, rows: Tensor) -> Tensor:
        """Caption numbers of rows of the table, int64 [B, 2]: winner's and loser's."""
        return self._numbers[rows]

    def conditioning(self, captions: Sequence[int]) -> dict[str, Tensor]:
        found = [divmod(number, self._shard_captions) for number in captions]
        shards = [(self._shards.open(shard), row) for shard, row in found]
        return {name: torch.stack([shard[name][row] for shard, row in shards]) for name in shards[0][0]}


class _Shards:
    """The numbered files of a folder, each opened once and mapped: pages are read when touched.

    A file's SHA-256 is compared with the manifest's before anything of it is trained on, once in a run.
    """

    def __init__(self, folder: Path, files: Mapping[str, Any]) -> None:
        self._folder, self._files = folder, files
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self._checked: set[int] = set()

    def open(self, number: int) -> dict[str, Tensor]:
        """The tensors of a file, whose bytes must be those that were written. Raises UserError otherwise."""
        if number not in self._checked:
            check_digest(self._path(number), self._files)
            self._checked.add(number)
        return self.mapped(number)

    def mapped(self, number: int) -> dict[str, Tensor]:
        """The tensors of a file, unchecked: to find one's way, before any of it is used."""
        if number not in self._mapped:
            self._mapped[number] = open_tensors(self._path(number))
        return self._mapped[number]

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.safetensors"


def check_digest(path: Path, files: Mapping[str, Any]) -> None:
    """Raise UserError unless a cache file has the SHA-256 that the manifest's `files` give it."""
    try:
        whole = sha256_file(path) == files[path.name]["sha256"]
    except (OSError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged", f"{type(error).__name__}: {error}", REPAIR) from error
    if not whole:
        raise UserError(f"{path} is damaged", "it has other bytes than when it was made", REPAIR)


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped. Raises UserError: it is missing, cut off or damaged in its header."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged", f"{type(error).__name__}: {error}", REPAIR) from error


def latent_key(name: str, size: Size) -> str:
    """Name of a tensor of latents in a cache file: "mean/512x512" (height x width)."""
    return f"{name}/{size[0]}x{size[1]}"
