"""One micro-batch of training on fake tensors: what every operation allocates and computes."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from diffpref.estimate.skeleton import Skeleton
from diffpref.training.batches import Batch
from diffpref.training.pair_errors import pair_errors
from diffpref.training.precision import HALF
from diffpref.training.reference import Measure, Reference

PHASES = ("encode", "reference", "forward", "backward")
TOKENS = 77  # of a caption: CLIP's, to which prompts are padded
TIME_IDS = 6  # of SDXL: original size, crop, target size


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any
) -> int:
    """Four matrix products; that fused kernels take the scores a second time is not counted, as usual."""
    return 2 * _attention_flops(query, key, value)


ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@dataclass(frozen=True)
class Trace:
    """One micro-batch, after each of its operations. live: bytes of all that it allocated and still holds,
    int64 [operations]. gradients: what of it stays as gradients of weights. flops: by phase, 2 per
    multiply-add."""

    live: NDArray[np.int64]
    gradients: NDArray[np.int64]
    flops: dict[str, int]


class Meter(TorchDispatchMode):
    """Watches the storages that operations return until they are freed, and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.bytes = "forward", 0
        self.timeline: list[int] = []  # bytes after each operation
        self.flops: dict[str, int] = dict.fromkeys(PHASES, 0)
        self.born: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # storage -> operation

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """These were there before: operations on views of them allocate nothing."""
        for tensor in tensors:
            self.born[tensor.untyped_storage()] = -1

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for at every turn: this shortcut is two thirds of all calls
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        packet = operation._overloadpacket
        if packet in ATTENTION:
            self.flops[self.phase] += ATTENTION[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.flops[self.phase] += flop_registry[packet](*args, **kwargs, out_val=result)
        self.timeline.append(self.bytes)
        return result

    def _watch(self, storage: Any) -> None:
        if storage not in self.born:
            self.born[storage] = len(self.timeline)
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes()).atexit = False

    def _free(self, count: int) -> None:
        self.bytes -= count

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def trace(self, gradients: Iterable[Tensor]) -> Trace:
        grown = np.zeros(len(self.timeline), np.int64)
        for gradient in gradients:
            storage = gradient.untyped_storage()
            grown[self.born[storage]] += storage.nbytes()
        return Trace(np.array(self.timeline, np.int64), grown.cumsum(), self.flops)


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Autocast of the CPU with the rules of CUDA, which runs norms and upsampling in fp32: the backward pass
    then keeps fp32 inputs of them. (torch/include/ATen/autocast_mode.h, AT_FORALL_FP32; the other operations
    listed there do not see half precision in these networks.)

    The functions themselves are replaced: torch switches a TorchFunctionMode off while a backward pass runs,
    in which gradient checkpointing computes the forward pass again.
    """

    def in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args = tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)
            return function(*args, **kwargs)

        return wrapped

    names = ("group_norm", "layer_norm", "interpolate")
    with contextlib.ExitStack() as replaced:
        for name in names:
            replaced.enter_context(mock.patch.object(F, name, in_fp32(getattr(F, name))))
        yield


def trace_micro_batch(skeleton: Skeleton, pairs: int, cuda: bool = True) -> Trace:
    """Forward and backward pass of `pairs`, gradients not there before. cuda: autocast as on CUDA, else as on
    the CPU. Call it inside the skeleton's FakeTensorMode."""
    meter = Meter()
    skeleton.unet.zero_grad(set_to_none=True)
    for network in skeleton.networks:
        meter.ignore(network.parameters())
        meter.ignore(network.buffers())
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # cycles that it would free at one moment or another
    try:
        with cuda_autocast() if cuda else contextlib.nullcontext(), meter:
            _micro_batch(skeleton, pairs, meter)
    finally:
        if collecting:
            gc.enable()
    return meter.trace([parameter.grad for parameter in skeleton.trained if parameter.grad is not None])


@dataclass(frozen=True)
class _Timed:
    """The reference, its work counted apart."""

    reference: Reference
    meter: Meter

    def errors(self, batch: Batch, measure: Measure) -> tuple[Tensor, Tensor]:
        with self.meter.during("reference"):
            return self.reference.errors(batch, measure)


def _micro_batch(skeleton: Skeleton, pairs: int, meter: Meter) -> None:
    """As `Stepper` does it."""
    half = HALF.get(skeleton.config.train.mixed_precision)
    autocast = partial(torch.autocast, "cpu", half) if half else contextlib.nullcontext
    if skeleton.vae is not None:
        with meter.during("encode"):
            _encode(skeleton, pairs)
    batch = _batch(skeleton, pairs)
    reference = _Timed(skeleton.reference, meter) if skeleton.reference is not None else None
    errors = pair_errors(skeleton.family, batch, skeleton.unet, reference, autocast)
    output = skeleton.objective(errors)
    with meter.during("backward"):
        output.loss.sum().backward()


def _batch(skeleton: Skeleton, pairs: int) -> Batch:
    images, side = 2 * pairs, skeleton.config.data.resolution // skeleton.family.codec.factor
    settings = skeleton.unet.config
    text = {"prompt_embeds": torch.empty(images, TOKENS, settings.cross_attention_dim)}
    if settings.addition_embed_type == "text_time":
        width = settings.projection_class_embeddings_input_dim - TIME_IDS * settings.addition_time_embed_dim
        text["pooled_embeds"] = torch.empty(images, width)
    size = torch.empty(images, 2, dtype=torch.long)
    latents = torch.empty(images, settings.in_channels, side, side)
    return Batch(
        pairs=[0] * pairs,
        draws=[0] * pairs,
        latents=latents,
        noise=torch.empty_like(latents),
        timesteps=torch.empty(images, dtype=torch.long),
        conditioning=text | skeleton.family.size_conditioning(size, size, size),
    )


@torch.no_grad()
def _encode(skeleton: Skeleton, pairs: int) -> None:
    """As `LatentCodec.encode` does it."""
    assert skeleton.vae is not None
    side, half = skeleton.config.data.resolution, HALF.get(skeleton.config.model.vae_precision)
    pixels = torch.empty(2 * pairs, 3, side, side)
    with torch.autocast("cpu", half) if half else contextlib.nullcontext():
        posterior = skeleton.vae.encode(pixels).latent_dist
    _ = posterior.mean.float(), posterior.logvar.float()
