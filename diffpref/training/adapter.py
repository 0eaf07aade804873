"""What of the UNet is trained: all of it, or LoRA adapters put into it."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig

from diffpref.config import AdapterConfig
from diffpref.errors import UserError, nearest


def prepare_unet(unet: Any, adapter: AdapterConfig, seed: int) -> None:
    """Mark what is trained; with LoRA also add the adapters, at zero effect and the same for a given seed.

    The network is put into evaluation mode: with dropout the policy would differ from the reference at step
    0.
    Raises UserError when a LoRA target matches no layer.
    """
    unet.eval()
    if adapter.type == "none":
        unet.requires_grad_(True)
        return
    unet.requires_grad_(False)
    _check_targets(unet, adapter)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        unet.add_adapter(
            LoraConfig(
                r=adapter.rank,
                lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # a fraction works as well
                target_modules=list(adapter.target_modules),
                init_lora_weights="gaussian",
            )
        )
    finally:
        torch.set_rng_state(state)


def _check_targets(unet: Any, adapter: AdapterConfig) -> None:
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [name for name, module in unet.named_modules() if isinstance(module, kinds)]
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
    if not adapter.target_modules:
        raise UserError("adapter.target_modules is empty", fix='such as ["to_q", "to_k", "to_v", "to_out.0"]')
