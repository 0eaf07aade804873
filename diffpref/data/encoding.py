"""One file of a cache at a time: pairs decoded and encoded, or captions, and written with a digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from diffpref.config import DataConfig
from diffpref.data.buckets import Buckets, Size, equal_area, square
from diffpref.data.cached import latent_key
from diffpref.data.decode import DecodedPair, PairDecoder
from diffpref.data.images import PixelSample, as_tensor
from diffpref.data.pairs import PairTable
from diffpref.data.parts import staged
from diffpref.engine import ahead
from diffpref.families.base import Family
from diffpref.families.vae import LatentCodec
from diffpref.paths import atomic_write_text

ABOUT = "about"
STORED = {"fp32": torch.float32, "fp16": torch.float16}
CAPTIONS_AT_ONCE = 32
AHEAD = 16
"""Decoded pairs that wait for the VAE."""
Contents = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors of a file, and what else stands in its header."""


@dataclass(frozen=True)
class Task:
    """One file to make. key: hash of all that shapes it.

    rows: the file holds the latents of pairs rows[0] to rows[1] - 1 of the table; or texts: what the text
    encoder makes of these captions.
    """

    path: Path
    key: str
    rows: tuple[int, int] = (0, 0)
    texts: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Pairs or captions in the file."""
        return len(self.texts) or self.rows[1] - self.rows[0]


class Encoder:
    """Makes files of a cache. A context manager: it may hold processes that decode (data.workers)."""

    def __init__(self, table: PairTable, family: Family, data: DataConfig) -> None:
        self._table, self._family, self._data = table, family, data
        self._decoder: PairDecoder | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def make(self, task: Task) -> Iterator[int]:
        """Encode and write one file, whole or not at all, and before it its SHA-256 beside it; yields the
        number of pairs or captions done since it last did.

        Raises UserError: another process is writing the file, latents are not finite, too many rows are bad.
        """
        with staged(task.path) as stream:
            tensors, about = yield from self._text(task.texts) if task.texts else self._latents(*task.rows)
            blob = pack(tensors, {"key": task.key, **about})
            stream.write(blob)
            atomic_write_text(digest_path(task.path), hashlib.sha256(blob).hexdigest() + "\n")

    def _text(self, texts: tuple[str, ...]) -> Generator[int, None, Contents]:
        batches = []
        for start in range(0, len(texts), CAPTIONS_AT_ONCE):
            batch = list(texts[start : start + CAPTIONS_AT_ONCE])
            batches.append(self._family.encode_prompts(batch))
            yield len(batch)
        tensors = {name: torch.cat([batch[name].cpu() for batch in batches]) for name in batches[0]}
        lengths = self._family.caption_tokens(list(texts))
        return tensors, {"truncated": sum(length > self._family.max_tokens for length in lengths)}

    def _latents(self, start: int, stop: int) -> Generator[int, None, Contents]:
        """Pairs in order, each with its sizes and the row of its latents among those of its bucket."""
        places: list[_Place] = []
        bad: list[tuple[str, str]] = []
        buckets: dict[Size, _Bucket] = {}
        decoded: Any = ahead(self._decoder_of_all().decode(start, stop), AHEAD)
        with contextlib.closing(decoded):
            for pair in decoded:
                if pair.images is None:
                    bad.append((pair.source, pair.reason))
                else:
                    size = pair.images[0].pixels.shape[:2]
                    bucket = buckets.setdefault(size, _Bucket(self._family.codec, self._data, size))
                    places.append(_Place.of(pair, size, bucket.pairs))
                    bucket.add(pair.images)
                yield 1
        tensors = _columns(places)
        for size, bucket in sorted(buckets.items()):
            mean, logvar = bucket.posterior()
            tensors |= {latent_key("mean", size): mean, latent_key("logvar", size): logvar}
        return tensors, {"bad": bad}

    def _decoder_of_all(self) -> PairDecoder:
        if self._decoder is None:
            buckets = buckets_of(self._data, self._family)
            decoder = PairDecoder(self._table, buckets, self._data.workers)
            self._decoder = self._open.enter_context(decoder)
        return self._decoder


class _Bucket:
    """The images of one size in a file, encoded in batches as they come."""

    def __init__(self, codec: LatentCodec, data: DataConfig, size: Size) -> None:
        self._codec, self._mirrored, self._size = codec, data.flip != "none", size
        self._stored = STORED[data.latent_precision]
        self._batch = min(64, max(2, 2**21 // (size[0] * size[1])))  # about 2 megapixels at once
        self._waiting: list[PixelSample] = []
        self._done: list[tuple[Tensor, Tensor]] = []
        self.pairs = 0

    def add(self, images: tuple[PixelSample, PixelSample]) -> None:
        self._waiting += images
        self.pairs += 1
        while len(self._waiting) >= self._batch:
            self._encode(self._batch)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [pairs, 2 (winner, loser), 1 or 2 (plain, mirrored), C, h, w]."""
        if self._waiting:
            self._encode(len(self._waiting))
        shape = (self.pairs, 2, 2 if self._mirrored else 1, *self._codec.latent_shape(*self._size))
        mean, logvar = (torch.cat(tensors).reshape(shape) for tensors in zip(*self._done, strict=True))
        return mean, logvar

    def _encode(self, count: int) -> None:
        pixels = as_tensor(self._waiting[:count])
        del self._waiting[:count]
        if self._mirrored:
            pixels = torch.stack([pixels, pixels.flip(-1)], dim=1).flatten(0, 1)
        mean, logvar = self._codec.encode(pixels)
        self._codec.check_finite(mean)
        self._done.append((mean.to("cpu", self._stored), logvar.to("cpu", self._stored)))


@dataclass(frozen=True, slots=True)
class _Place:
    """What the file says of a pair beside its latents; (height, width) and (top, left) of both images."""

    pair_id: int
    index: int
    row: int
    size: Size
    original: tuple[Size, ...]
    crop: tuple[tuple[Size, Size], ...]  # plain and mirrored

    @staticmethod
    def of(pair: DecodedPair, size: Size, row: int) -> _Place:
        images = pair.images or ()
        crops = tuple((image.crop, image.mirrored().crop) for image in images)
        return _Place(pair.id, pair.index, row, size, tuple(image.original_size for image in images), crops)


def _columns(places: list[_Place]) -> dict[str, Tensor]:
    """int64: pair_id, index, row [pairs], size [pairs, 2], original [pairs, 2, 2], crop [pairs, 2, 2, 2]."""
    shapes = {"pair_id": (), "index": (), "row": (), "size": (2,), "original": (2, 2), "crop": (2, 2, 2)}
    return {
        name: torch.tensor([getattr(place, name) for place in places], dtype=torch.int64).reshape(-1, *shape)
        for name, shape in shapes.items()
    }


def buckets_of(data: DataConfig, family: Family) -> Buckets:
    """The rectangles that pairs are trained at."""
    if data.aspect == "buckets":
        return equal_area(data.resolution, family.side_multiple)
    return square(data.resolution)


def pack(tensors: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    """A safetensors file with JSON about it: one entry, since several are written in random order, and equal
    caches should be equal files."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {ABOUT: json.dumps(about)})


def digest_path(path: Path) -> Path:
    """Where the SHA-256 of a file stands until the manifest says it."""
    return path.with_suffix(".sha256")
