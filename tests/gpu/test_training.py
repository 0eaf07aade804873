"""What only a GPU can show of training. `pytest -m gpu tests/gpu`; skipped where there is none.

Networks are miniatures with random weights, but for memory, which is that of full-size ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from published import Published

from diffpref.estimate import estimate

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MODELS = ["sd15", "sd21", "sdxl"]
BATCH = {"train.batch_size": 4, "train.micro_batch": 2, "train.learning_rate": 1e-4}
ADAPTERS = {"full": {}, "lora": {"adapter.type": "lora"}, "dora": {"adapter.type": "dora"}}


def stepper(tmp_path: Path, model: str = "sd15", pairs: int = 4, **switches):
    """A miniature's. Keys have "__" for the dots."""
    torch.manual_seed(0)
    published = Published(model, False, torch.device(DEVICE), tmp_path / "model")
    given = {name.replace("__", "."): value for name, value in switches.items()}
    return published.stepper(BATCH | given, published.cache(tmp_path / "noise", pairs), tmp_path)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model", MODELS)
def test_before_training_every_margin_is_exactly_zero(tmp_path, model, adapter, precision):
    changes = ADAPTERS[adapter] | {"train.mixed_precision": precision}
    one = stepper(tmp_path, model, **changes)
    one.take(1)
    one.settle()
    found = one.meters.read()
    assert found["margin"] == 0.0
    assert found["winner_gain"] == found["loser_gain"] == 0.0


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"adapter.type": "lora"}, {"train.channels_last": True}], ids=str)
def test_no_step_waits_for_the_device(tmp_path, changes, precision):
    one = stepper(tmp_path, **changes, **{"train.mixed_precision": precision})
    for step in (1, 2, 3):  # kernels are loaded, the optimizer's state is made
        one.take(step)
    one.settle()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.take(4)
        with pytest.raises(RuntimeError, match="synchronizing"):  # or nothing was watched
            torch.ones(1, device=DEVICE).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    one.settle()


def test_fp16_leaves_out_steps_that_overflow_and_goes_on(tmp_path):
    one = stepper(tmp_path, train__mixed_precision="fp16")
    before = {name: weight.detach().clone() for name, weight in one.parameters.items()}
    one.accelerator.scaler.update(2.0**40)  # no gradient of this size is an fp16 number
    one.take(1)
    one.settle()
    assert one.meters.read()["skipped"] == 1
    assert all(torch.equal(before[name], weight) for name, weight in one.parameters.items())
    for step in range(2, 40):
        one.take(step)
        one.settle()
    assert any(not torch.equal(before[name], weight) for name, weight in one.parameters.items())
    assert all(torch.isfinite(weight).all() for weight in one.parameters.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_steps_taken_twice_give_the_same_bits(tmp_path, precision):
    """Without it nothing could be resumed to the same bits."""
    found = []
    for name in ("a", "b"):
        one = stepper(tmp_path / name, train__mixed_precision=precision)
        for step in (1, 2, 3):
            one.take(step)
        one.settle()
        found.append({name: weight.detach().clone() for name, weight in one.parameters.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(("precision", "allowed"), [("no", 1e-4), ("bf16", 2e-2)])
def test_compiled_blocks_train_as_eager_ones_do(tmp_path, precision, allowed):
    """Loss and errors after two steps, relative."""
    found = []
    for compiled in (False, True):
        one = stepper(
            tmp_path / str(compiled), train__compile=compiled, train__mixed_precision=precision,
            train__learning_rate=1e-6,
        )  # fmt: skip
        for step in (1, 2):
            one.take(step)
        one.settle()
        found.append(one.meters.read())
    for name in ("loss", "winner_error", "loser_error"):
        assert found[1][name] == pytest.approx(found[0][name], rel=allowed)


@pytest.mark.parametrize(("pairs", "changes"), [(2, {}), (4, {"adapter.type": "lora"})], ids=["full", "lora"])
def test_a_full_size_step_takes_the_memory_of_the_estimate(tmp_path, pairs, changes):
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("this GPU has no 30 GiB to spare")
    published = Published("sd15", True, torch.device(DEVICE), tmp_path / "model")
    given = changes | {
        "train.batch_size": pairs,
        "train.micro_batch": pairs,
        "train.mixed_precision": "bf16",
    }
    expected = estimate(published.config(given | {"model.base": "architecture:sd15"})).peak
    one = published.stepper(given, published.cache(tmp_path / "noise", pairs), tmp_path)
    one.take(1)
    one.settle()
    torch.cuda.reset_peak_memory_stats()
    one.take(2)
    one.settle()
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.1)
