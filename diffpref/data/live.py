"""Latents encoded at every visit, for data.cache_latents = false: no disk, random crops, several times the
work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from diffpref.data.buckets import Size
from diffpref.data.cached import LatentPairs, Place
from diffpref.data.images import PixelSample, as_tensor, to_pixels
from diffpref.data.pairs import PairTable
from diffpref.errors import UserError

if TYPE_CHECKING:
    from diffpref.families.vae import LatentCodec


log = logging.getLogger("diffpref")


class LiveLatents:
    """Implements `Latents`. A pair whose images turn out unusable is replaced by the next good one of the
    table, captions included, whatever the order of visits; too many stop the run (data.max_bad_share)."""

    def __init__(self, table: PairTable, codec: LatentCodec, resolution: int, pairs_hash: str) -> None:
        """pairs_hash: identifies the contents of the table."""
        self._table, self._codec = table, codec
        self._size: Size = (resolution, resolution)
        self.pair_ids = table.pair_ids()
        self.rows = torch.arange(len(table))
        self.sizes = torch.tensor(self._size).expand(len(table), 2)
        self.key_hash = pairs_hash
        self.manifest: dict[str, Any] = {"bad": 0, "identical": 0, "first_bad": []}

    def read(
        self, pairs: Sequence[int], flips: Sequence[tuple[bool, bool]], places: Sequence[Place] | None
    ) -> LatentPairs:
        samples: list[PixelSample] = []
        for number, (pair, sides) in enumerate(zip(pairs, flips, strict=True)):
            found = self._load(pair)
            for image, flip in zip((found.winner_image, found.loser_image), sides, strict=True):
                sample = to_pixels(image, self._size, places[number] if places else None)
                samples.append(sample.mirrored() if flip else sample)
        mean, logvar = self._codec.encode(as_tensor(samples))
        self._codec.check_finite(mean)
        shape = (len(pairs), 2)
        return LatentPairs(
            mean=mean.unflatten(0, shape),
            logvar=logvar.unflatten(0, shape),
            original=torch.tensor([sample.original_size for sample in samples]).unflatten(0, shape),
            crop=torch.tensor([sample.crop for sample in samples]).unflatten(0, shape),
            size=self._size,
        )

    def _load(self, pair: int) -> Any:
        """The pair, or the next good one, whose place it takes from then on."""
        for index in range(int(self.rows[pair]), int(self.rows[pair]) + len(self._table)):
            found = self._table.try_load(index % len(self._table))
            if found is not None:
                self.rows[pair] = index % len(self._table)
                return found
            log.warning(
                "%s cannot be used and is replaced by the next pair: %s",
                self._table.source(index % len(self._table)), self._table.problem(index % len(self._table)),
            )  # fmt: skip
        raise UserError("no usable pair is left", why=self._table.stats.summary(), fix="see diffpref check")
