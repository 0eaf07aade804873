"""The policy: what of the UNet is trained, and with which kernels it runs."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch import nn

from diffpref.config import AdapterConfig, LoopConfig, TrainConfig
from diffpref.errors import UserError, nearest

MOST_GRAPHS = 4096  # of all sizes that buckets may have


def prepare_unet(unet: Any, config: TrainConfig) -> None:
    """Mark what is trained; with an adapter also add it, at zero effect and the same for a given seed.

    The network is put into evaluation mode: with dropout the policy would differ from the reference at step
    0. Attention backend and gradient checkpointing are set here, before a reference is copied, so that both
    run the same kernels.
    """
    unet.eval()
    if config.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.model.attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    unet.requires_grad_(config.adapter.type == "none")
    if config.adapter.type != "none":
        _add_adapter(unet, config.adapter, config.seed)


def _add_adapter(unet: Any, adapter: AdapterConfig, seed: int) -> None:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        unet.add_adapter(
            LoraConfig(
                r=adapter.rank,
                lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # a fraction works as well
                target_modules=list(adapter.target_modules),
                init_lora_weights="gaussian",
                use_dora=adapter.type == "dora",
            )
        )
    finally:
        torch.set_rng_state(state)


def compile_blocks(unet: nn.Module, backend: str = "inductor") -> None:
    """Compile the UNet's transformer and resnet blocks, which repeat: one compilation serves many of them.

    All blocks of a class share one code object, which dynamo gives up on, and runs uncompiled, after a number
    of graphs. At one image size SD1.5's policy and reference have 19 each (its LoRA 21), SDXL's 15 (16); each
    further size has as many.
    """
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(MOST_GRAPHS, getattr(torch._dynamo.config, limit)))
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            module.compile(dynamic=False, backend=backend)


def uncompiled(train: LoopConfig) -> AbstractContextManager[Any]:
    """Inside the block compiled networks run as they are: for passes of sizes of their own, which would take
    minutes to compile for, and for comparisons with errors that the base gave uncompiled."""
    return torch.compiler.set_stance("force_eager") if train.compile else contextlib.nullcontext()


def check_targets(unet: nn.Module, adapter: AdapterConfig) -> None:
    """Raise UserError when a LoRA target matches no layer. The UNet's weights are not looked at: a skeleton
    will do."""
    if adapter.type == "none":
        return
    if not adapter.target_modules:
        raise UserError("adapter.target_modules is empty", fix='such as ["to_q", "to_k", "to_v", "to_out.0"]')
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in adapter.target_modules:
        if any(name == target or name.endswith(f".{target}") for name in layers):
            continue
        ends = {".".join(name.split(".")[-count:]) for name in layers for count in (1, 2)}
        close = nearest(target, ends)
        raise UserError(
            f"adapter.target_modules: {target!r} matches no layer of the UNet",
            why=f"its layers end in {', '.join(sorted(ends)[:12])}, ...",
            fix=f"did you mean {close!r}?"
            if close
            else "name layers by the end of their names, such as to_q",
        )
