"""Compiled blocks, with dynamo's "eager" backend: graphs are made and counted, and run as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.utils import counters

from diffpref.config import AdapterConfig, DataConfig, ModelConfig, TrainConfig
from diffpref.config.schema import LoopConfig
from diffpref.families import load_family
from diffpref.families.architectures import ARCHITECTURES
from diffpref.families.miniature import write_miniature
from diffpref.training.policy import compile_blocks, prepare_unet, uncompiled


@pytest.fixture(autouse=True)
def dynamo():
    """Without graphs and counts; its limits are as they were before, afterwards."""
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits
    torch._dynamo.reset()


@pytest.fixture(params=["sd15", "sdxl"])
def family(request, tmp_path, dynamo):
    """A miniature whose blocks are compiled."""
    found = load_family(ModelConfig(base=str(write_miniature(tmp_path / "model", request.param))))
    compile_blocks(found.unet, backend="eager")
    return found


def passed(family, side: int) -> torch.Tensor:
    """A forward pass of one latent."""
    torch.manual_seed(0)
    text = {"prompt_embeds": torch.randn(1, 77, family.unet.config.cross_attention_dim)}
    if family.name == "sdxl":
        width = family.unet.config.projection_class_embeddings_input_dim
        width -= 6 * family.unet.config.addition_time_embed_dim
        text |= {"pooled_embeds": torch.randn(1, width), "time_ids": torch.randn(1, 6)}
    return family.predict(family.unet, torch.randn(1, 4, side, side), torch.tensor([500]), text)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_every_size_has_its_graphs_and_none_breaks(family):
    """Sizes of which none is another's half: their levels have no shape in common."""
    made = []
    for side in (8, 24):
        before = graphs()
        passed(family, side)
        made.append(graphs() - before)
    assert made[0] == made[1] >= 6
    assert not counters["graph_break"]
    passed(family, 8)
    assert graphs() == sum(made)


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_a_limit_holds_for_all_blocks_of_a_class_together(family):
    """Why a limit of 64 left blocks of a third size uncompiled: the miniature has 11 shapes of resnet blocks
    and 4 of transformer blocks."""
    torch._dynamo.config.recompile_limit = 10
    passed(family, 8)
    assert graphs() == 10 + 4


def test_limits_have_room_for_the_buckets_of_a_full_size_network():
    """40 graphs of a LoRA of SD1.5 and its reference, for each of some forty rectangles, and again for a last
    micro-batch of another size."""
    torch._dynamo.config.recompile_limit = 8
    compile_blocks(torch.nn.Identity())
    assert torch._dynamo.config.recompile_limit >= 2 * 40 * 40
    assert torch._dynamo.config.accumulated_recompile_limit >= 2 * 40 * 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "adapter", "made"),
    [("sd15", "none", 19), ("sdxl", "none", 15), ("sd15", "lora", 21), ("sdxl", "lora", 16)],
)
def test_graphs_of_a_full_size_network(name, adapter, made):
    """Of one size of image, on the meta device: shapes and no weights. A reference, which runs without
    gradients, has graphs of its own: 38, 30, 40 and 31 in all."""
    kind = ARCHITECTURES[name]
    model, data = ModelConfig(base=f"architecture:{name}"), DataConfig(pairs="none")
    config = TrainConfig(model=model, data=data, adapter=AdapterConfig(type=adapter))
    side = kind.resolution // 8
    with torch.device("meta"):
        unet = UNet2DConditionModel(**kind.unet)
        prepare_unet(unet, config)
        compile_blocks(unet, backend="eager")
        added = None
        if name == "sdxl":
            added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.randn(1, 6)}
        text = torch.randn(1, 77, unet.config.cross_attention_dim)
        inputs = torch.randn(1, 4, side, side), torch.tensor(500), text
        unet(*inputs, added_cond_kwargs=added)
        assert graphs() == made
        if adapter == "none":  # as the reference is, of a LoRA too
            with torch.no_grad():
                unet(*inputs, added_cond_kwargs=added)
            assert graphs() == 2 * made
    assert not counters["graph_break"]


def test_what_runs_uncompiled_makes_no_graphs(family):
    train = replace(LoopConfig(), compile=True)
    with torch.no_grad(), uncompiled(train):
        eager = passed(family, 8)
    assert graphs() == 0
    compiled = passed(family, 8)
    assert graphs() > 0
    assert torch.allclose(eager, compiled, atol=1e-5)
    with uncompiled(LoopConfig()):  # a run without compilation does not touch dynamo
        passed(family, 16)
    assert graphs() > 0
