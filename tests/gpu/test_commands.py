"""`diffpref train` on a GPU: stopped and resumed, it ends in the weights of the run that was not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from diffpref.config.loading import load_train_config
from diffpref.training.run import train

pytestmark = pytest.mark.gpu

SHORT = {
    "data.max_pairs": "32", "data.validation": "", "train.batch_size": "8", "train.micro_batch": "4",
    "train.warmup_steps": "0", "train.schedule": "constant", "checkpoint.every": "2", "sampling.count": "0",
    "validation.every": "0",
}  # fmt: skip


def run(folder, steps, **changes):
    given = SHORT | {"output": str(folder), "train.steps": str(steps)} | changes
    train(load_train_config("tiny-dpo", list(given.items())))
    names = {"none": "model/unet/diffusion_pytorch_model.safetensors"}
    default = "model/pytorch_lora_weights.safetensors"
    return load_file(folder / names.get(changes.get("adapter.type", "none"), default))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, adapter, precision):
    changes = {"adapter.type": adapter, "train.mixed_precision": precision}
    whole = run(tmp_path / "whole", 4, **changes)
    run(tmp_path / "parts", 2, **changes)
    parts = run(tmp_path / "parts", 4, **changes)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
