"""Grids are drawn in the run's precision."""

from __future__ import annotations

import contextlib
from functools import partial

import torch

from diffpref.config import ModelConfig
from diffpref.families import load_family
from diffpref.families.miniature import stable_diffusion
from diffpref.training.precision import cast_frozen
from diffpref.training.samples import autocasting


def draw(family, autocast):
    """The image of a pipeline whose networks' precisions are written down."""
    seen: dict[str, set[torch.dtype]] = {"unet": set(), "given": set(), "vae": set()}
    pipeline = family.pipeline(family.unet)

    def note(name):
        return lambda module, inputs, output: seen[name].add(output.dtype)

    hooks = [
        family.unet.conv_in.register_forward_hook(note("unet")),
        family.unet.register_forward_hook(lambda module, inputs, output: seen["given"].add(output[0].dtype)),
        pipeline.vae.decoder.conv_in.register_forward_hook(note("vae")),
    ]
    with autocasting(family.unet, autocast), torch.no_grad():
        image = pipeline(
            prompt=["red"], num_inference_steps=2, height=32, width=32, output_type="pt",
            generator=[torch.Generator("cpu").manual_seed(0)],
        ).images  # fmt: skip
    for hook in hooks:
        hook.remove()
    return image, seen


def test_the_denoiser_alone_runs_in_the_runs_precision(tmp_path):
    family = load_family(ModelConfig(base=str(stable_diffusion(tmp_path / "model"))))
    half, whole = torch.bfloat16, torch.float32
    exact, seen = draw(family, contextlib.nullcontext)
    assert seen == {"unet": {whole}, "given": {whole}, "vae": {whole}}
    image, seen = draw(family, partial(torch.autocast, "cpu", half))
    assert seen == {"unet": {half}, "given": {whole}, "vae": {whole}}
    assert 0 < (image - exact).abs().max() < 0.1  # rounding
    again, _ = draw(family, contextlib.nullcontext)
    assert torch.equal(again, exact)  # nothing of it is left
    cast_frozen(family.unet.requires_grad_(False), half)  # as under a LoRA: the same products
    cast, _ = draw(family, partial(torch.autocast, "cpu", half))
    assert torch.equal(cast, image)
