"""CLIP networks behind one interface: images and texts to unit vectors, each computed once.

A `Network` is what a loader made; evaluators with the same weights share it. A `Clip` reads it with one rule
for pixels and one for text. Embeddings are kept by content (pixels; tokens), so repeated images and prompts,
also those of another evaluator on the same network, cost one pass.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffpref.errors import UserError
from diffpref.evaluators.base import Dtype, Runtime
from diffpref.evaluators.pixels import Pixels, content
from diffpref.transfer import to_device

DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REMEMBERED = 16_384
"""Embeddings kept of one network: 64 MiB at a width of 1024."""
_CPU_BATCH = 4
_TEXT_STEP = 16

Floats = NDArray[np.float32]
Row = TypeVar("Row")


@dataclass(frozen=True)
class Tokens:
    """A text as the network reads it. cut: tokens beyond the limit, which it does not see."""

    ids: tuple[int, ...]
    cut: int = 0


class TextRule(Protocol):
    """How a text becomes tokens."""

    def __call__(self, text: str) -> Tokens: ...

    def describe(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values, for fingerprints."""
        ...


@dataclass(frozen=True, eq=False)
class Network:
    """A loaded CLIP.

    weights: SHA-256 of their values as loaded (fp32). pixels, text: the rules that its publisher states.
    encode_images: float [B, 3, S, S] to [B, D]. encode_texts: int64 [B, T] to [B, D]; not normalised.
    pad: token that may follow a text without changing its embedding, which allows passes as long as their
    texts; None when every text already comes at full length. width: D. logit_scale: the factor learned
    with it.
    """

    weights: str
    device: torch.device
    dtype: Dtype
    pixels: Pixels
    text: TextRule
    encode_images: Callable[[torch.Tensor], torch.Tensor]
    encode_texts: Callable[[torch.Tensor], torch.Tensor]
    context: int
    pad: int | None
    width: int
    logit_scale: float
    known: OrderedDict[Hashable, Floats] = field(default_factory=OrderedDict)


@dataclass(frozen=True)
class Clip:
    """A network read with one rule for pixels and one for text.

    Every pass is filled up with blanks to one size, so that an embedding has the same bits whatever else is
    embedded with it. Another size moves it by rounding errors (1e-6). It is ``batch`` images or texts on a
    GPU; on a CPU, where more are not faster and known ones would leave more blanks, at most 4 images, and 4
    texts. The passes of a call are fetched from the device together.
    """

    network: Network
    pixels: Pixels
    text: TextRule
    batch: int

    def embed_images(self, images: Sequence[Image.Image]) -> Floats:
        """Unit vectors [N, D] of images of any mode."""
        images = list(_in_threads(self.pixels.read, images))
        keys = list(_in_threads(self._image_key, images))
        size = self.pixels.size
        blank = torch.zeros(3, size, size)

        def encode(missing: list[Image.Image]) -> Floats:
            passes = []
            for start in range(0, len(missing), self._pass):
                part = list(_in_threads(self.pixels, missing[start : start + self._pass]))
                filled = torch.stack([*part, *[blank] * (self._pass - len(part))])
                passes.append(self._forward(self.network.encode_images, filled, True)[: len(part)])
            return _fetched(passes)

        return self._look_up(keys, images, encode)

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Unit vectors [N, D]. Texts beyond the network's limit are cut as the text rule says."""
        tokens = [self.text(text).ids for text in texts]
        keys: list[Hashable] = [("text", self._text_pass, ids) for ids in tokens]
        return self._look_up(keys, tokens, self._encode_tokens)

    def cut(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Tokens [N] of each text that the network does not see."""
        return np.array([self.text(text).cut for text in texts], np.float32)

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> NDArray[np.float64]:
        """Cosine [N] of each image and its text, in -1..1."""
        pictures, words = self.embed_images(images), self.embed_texts(texts)
        return np.einsum("nd,nd->n", pictures.astype(np.float64), words.astype(np.float64))

    def describe(self) -> dict[str, Any]:
        """Everything that decides the embeddings, for fingerprints."""
        return {
            "weights": self.network.weights,
            "dtype": self.network.dtype,
            "pixels": self.pixels.describe(),
            "text": self.text.describe(),
        }

    @property
    def _pass(self) -> int:
        """Images in one pass."""
        return min(self.batch, _CPU_BATCH) if self.network.device.type == "cpu" else self.batch

    @property
    def _text_pass(self) -> int:
        """Texts in one pass."""
        return _CPU_BATCH if self.network.device.type == "cpu" else self.batch

    def _image_key(self, image: Image.Image) -> Hashable:
        return ("image", self._pass, self.pixels.plan(image.size), content(image))

    def _encode_tokens(self, missing: list[tuple[int, ...]]) -> Floats:
        """Vectors in the order of ``missing``; short texts in short passes, each of a length of its own."""
        lengths = [self._length(ids) for ids in missing]
        order, passes = [], []
        for length in sorted(set(lengths)):
            members = [index for index, own in enumerate(lengths) if own == length]
            for start in range(0, len(members), self._text_pass):
                part = members[start : start + self._text_pass]
                ids = torch.full((self._text_pass, length), self.network.pad or 0, dtype=torch.long)
                for row, index in enumerate(part):
                    ids[row, : len(missing[index])] = torch.tensor(missing[index])
                order += part
                passes.append(self._forward(self.network.encode_texts, ids, False)[: len(part)])
        vectors = np.empty((len(missing), self.network.width), np.float32)
        vectors[order] = _fetched(passes)
        return vectors

    def _length(self, ids: tuple[int, ...]) -> int:
        if self.network.pad is None:
            return len(ids)
        return min(self.network.context, -(-len(ids) // _TEXT_STEP) * _TEXT_STEP)

    def _forward(
        self, encode: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, cast: bool
    ) -> torch.Tensor:
        """Unit vectors on the network's device, which nobody waits for."""
        device, dtype = self.network.device, DTYPES[self.network.dtype]
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            features = encode(to_device(rows, device, dtype if cast else None)).float()
            return features / features.norm(dim=-1, keepdim=True)

    def _look_up(
        self, keys: list[Hashable], items: Sequence[Row], encode: Callable[[list[Row]], Floats]
    ) -> Floats:
        """The vectors of all keys, those not known yet from ``encode``."""
        known = self.network.known
        found = {key: known[key] for key in keys if key in known}
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in found}
        vectors = encode(list(missing.values())) if missing else ()
        found.update(zip(missing, vectors, strict=True))
        for key, vector in found.items():
            known[key] = vector
            known.move_to_end(key)
        while len(known) > REMEMBERED:
            known.popitem(last=False)
        return np.array([found[key] for key in keys], np.float32).reshape(len(keys), self.network.width)


def _fetched(passes: Sequence[torch.Tensor]) -> Floats:
    """The rows of all passes: here the device is waited for."""
    return np.asarray(torch.cat(list(passes)).cpu().numpy(), np.float32)


def placed(runtime: Runtime) -> torch.device:
    """The device of a runtime, after checking that it is there and can compute in the runtime's dtype.

    Raises:
        UserError: no such device, fp16 on the CPU, a batch below 1, an unknown dtype.
    """
    if runtime.batch < 1:
        raise UserError("an evaluator's batch must be at least 1", why=f"it is {runtime.batch}")
    if runtime.dtype not in DTYPES:
        raise UserError(f"there is no dtype {runtime.dtype!r}", fix=f"one of {', '.join(DTYPES)}")
    try:
        device = torch.device(runtime.chosen_device)
        torch.empty(1, device=device)
    except Exception as error:  # RuntimeError, AssertionError of builds without CUDA, AcceleratorError
        raise UserError(
            f"the device {runtime.chosen_device!r} cannot be used",
            why=" ".join(str(error).split("\n")[0].split()),
            fix="cpu, cuda, cuda:1 ...; see diffpref env",
        ) from error
    if device.type == "cpu" and runtime.dtype == "fp16":
        raise UserError(
            "evaluators do not run in fp16 on the CPU",
            why="processors emulate it, slower than fp32 and less exact",
            fix="dtype fp32 (the default), or bf16 to halve the memory",
        )
    return device


def _in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
    """``map`` over several cores, in order: Pillow, hashes and copies release Python's lock."""
    workers = min(8, len(items), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    if workers < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))
