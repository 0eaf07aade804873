"""One optimizer step: it never waits for the device nor uses a value that is not finite; equal references."""

from __future__ import annotations

import psutil
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from diffpref.config import parse_train_config
from diffpref.data.cache import build_cache
from diffpref.data.pairs import open_pairs
from diffpref.errors import UserError
from diffpref.families import load_family
from diffpref.families.miniature import stable_diffusion
from diffpref.objectives import OBJECTIVES
from diffpref.training.flags import LAG
from diffpref.training.micro_batch import divisors
from diffpref.training.policy import prepare_unet
from diffpref.training.setup import make_launch
from diffpref.training.stepper import Stepper
from diffpref.training.stop import StopRequest
from tests.miniatures import config, rows, write_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model") / "model")


def make(tmp_path, model, start=True, count=8, **changes):
    pairs = write_pairs(tmp_path / "pairs.parquet", rows(count))
    settings = parse_train_config(config(model, pairs, tmp_path / "run", **changes))
    launch = make_launch(settings)
    family = load_family(settings.model)
    inputs = family.fingerprint()
    prepare_unet(family.unet, settings)
    cache = build_cache(open_pairs(pairs), family, settings.data, tmp_path / "cache", False)
    objective = OBJECTIVES[settings.objective.name](**settings.objective.params)
    stepper = Stepper(settings, launch.accelerator, family, objective, cache, False, StopRequest())
    if start:
        stepper.start(inputs, tmp_path / "cache", None)
    return stepper


class Waits(TorchFunctionMode):
    """Follows everything computed from weights and batches, as if it were on a device, and counts what would
    make the host wait for one of these values."""

    READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero")

    def __init__(self, weights):
        super().__init__()
        self.on_device = WeakIdKeyDictionary()
        self.found = []
        for weight in weights:
            self.follow(weight)

    def follow(self, tensor):
        self.on_device[tensor] = True
        return tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        touched = any(self._is_followed(value) for value in [*args, *(kwargs or {}).values()])
        if touched and name in self.READS:
            self.found.append(name)
        if name == "tensor" and (kwargs or {}).get("device") is not None:
            self.found.append("tensor")  # a number sent to the device
        result = func(*args, **(kwargs or {}))
        if name == "copy_" and not self._is_followed(args[0]):
            if touched and not (kwargs or {}).get("non_blocking"):
                self.found.append("copy_")
            return result
        if touched:
            self._follow_all(result)
        return result

    def _is_followed(self, value):
        if isinstance(value, list | tuple):
            return any(map(self._is_followed, value))
        return isinstance(value, torch.Tensor) and value in self.on_device

    def _follow_all(self, value):
        if isinstance(value, list | tuple):
            for one in value:
                self._follow_all(one)
        elif isinstance(value, torch.Tensor):
            self.on_device[value] = True


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter__type": "lora", "train__ema_decay": 0.9, "train__mixed_precision": "bf16"},
        {"objective": {"name": "mapo"}, "train__micro_batch": 2},
        {"reference__kind": "cached"},
    ],
)
def test_no_step_waits_for_the_device(tmp_path, model, monkeypatch, changes):
    stepper = make(tmp_path, model, **changes)
    waits = Waits([*stepper.unet.parameters(), stepper.flags.broken])
    send = stepper.batches._send
    monkeypatch.setattr(stepper.batches, "_send", lambda tensor: waits.follow(send(tensor)))
    with waits:
        for step in range(1, 6):
            stepper.take(step)
        assert waits.found == []
        stepper.meters.read()  # a log row does wait, and this test sees it
        assert waits.found


def poison(stepper, step):
    """Make the first pair of `step` one whose latents are not finite; returns its id."""
    pair = stepper.micro_batches(step)[0][0][0]
    read = stepper.cache.latents

    def poisoned(pairs, flips=None, places=None):
        found = read(pairs, flips, places)
        if pair in pairs:
            found.mean[list(pairs).index(pair)] = float("nan")
        return found

    stepper.cache.latents = poisoned
    return stepper.cache.pair_ids[pair]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw8bit"])
def test_a_broken_step_is_not_taken_though_it_is_noticed_later(tmp_path, model, optimizer):
    stepper = make(tmp_path, model, count=40, train__optimizer=optimizer)
    for step in (1, 2):
        stepper.take(step)
    before = {name: value.detach().clone() for name, value in stepper.parameters.items()}
    bad = poison(stepper, 3)

    def go_on():
        for step in range(3, 3 + LAG + 1):
            stepper.take(step)

    with pytest.raises(UserError, match="the loss of step 3 is not finite") as caught:
        go_on()
    assert f"(ids): {bad};" in caught.value.why
    assert all(torch.equal(value, before[name]) for name, value in stepper.parameters.items())


def test_settling_finds_it_at_once(tmp_path, model):
    stepper = make(tmp_path, model, count=40)
    poison(stepper, 1)
    stepper.take(1)
    with pytest.raises(UserError, match="step 1"):
        stepper.settle()


def margins(stepper, seed=0, steps=(1, 2, 3, 4)):
    """Margins of a policy that was moved at random, on the draws of some steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in stepper.parameters.items():
            if "lora_A" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    found = []
    from diffpref.training.pair_errors import pair_errors

    for step in steps:
        for pairs, visits in stepper.micro_batches(step):
            batch = stepper.batches.visit([visit % 2 for visit in visits], pairs)
            errors = pair_errors(
                stepper.family, batch, stepper.policy, stepper.reference, stepper.accelerator.autocast
            )
            assert errors.ref_w is not None
            found.append((errors.ref_w - errors.policy_w) - (errors.ref_l - errors.policy_l))
    return torch.cat(found).detach()


@pytest.mark.parametrize("adapter", ["none", "lora", "dora"])
def test_every_kind_of_reference_gives_the_same_margins(tmp_path, model, adapter):
    kinds = ("copy", "cached") if adapter == "none" else ("copy", "adapter", "cached")
    found = {}
    for kind in kinds:
        changes = {"reference__draws": 2} if kind == "cached" else {}
        stepper = make(tmp_path, model, adapter__type=adapter, reference__kind=kind, **changes)
        found[kind] = margins(stepper)
    for kind in kinds:
        assert found[kind].abs().max() > 1e-4
        assert torch.allclose(found[kind], found["copy"], atol=1e-5, rtol=0), kind


@pytest.mark.parametrize("kind", ["copy", "adapter", "cached"])
def test_before_training_every_margin_is_exactly_zero(tmp_path, model, kind):
    """The cache covers the whole run: two draws a pair, four epochs, micro-batches, flips and dropout."""
    stepper = make(
        tmp_path, model, adapter__type="lora", reference__kind=kind, train__steps=8, train__micro_batch=2,
        data__flip="separate", data__prompt_dropout=0.3,
        **({"reference__draws": 2} if kind == "cached" else {}),
    )  # fmt: skip
    stepper.distribution.step = lambda: stepper.optimizer.zero_grad()  # stay untrained
    for step in range(1, 9):
        stepper.take(step)
        assert stepper.meters.read()["margin"] == 0.0


def test_a_reference_cache_is_continued_after_a_kill_and_made_anew_for_another_base(tmp_path, model):
    from diffpref.training import reference_cache

    changes = {"reference__kind": "cached", "reference__draws": 2, "train__steps": 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_cache, "STEPS_A_FILE", 1)
        whole = make(tmp_path, model, **changes).reference._errors
        (place,) = (tmp_path / "cache").glob("reference-*")
        files = sorted(place.glob("*.safetensors"))
        assert len(files) == 4  # 8 pairs, 4 a step: two epochs are four steps, and two draws are two epochs
        stamps = [path.stat().st_mtime_ns for path in files]
        files[2].unlink()
        again = make(tmp_path, model, **changes).reference._errors
        assert torch.equal(whole, again)
        assert [path.stat().st_mtime_ns for path in files[:2]] == stamps[:2]
        other = stable_diffusion(tmp_path / "other", seed=1)
        assert not torch.equal(make(tmp_path, other, **changes).reference._errors, whole)
    assert len(list((tmp_path / "cache").glob("reference-*"))) == 2


def test_a_pair_that_a_step_has_twice_gets_other_random_numbers(tmp_path, model):
    stepper = make(tmp_path, model, count=3, train__batch_size=8, objective={"name": "sft"})
    pairs, draws = stepper.micro_batches(1)[0][0], stepper._draws(1)[0]
    assert len(set(pairs)) == 3
    assert len(set(zip(pairs, draws, strict=True))) == 8
    assert draws.count(1) == 3  # the first of each is drawn for the step
    assert not set(draws) & set(stepper._draws(2)[0])


def test_a_micro_batch_is_found_where_the_reference_is_not_there_yet(tmp_path, model):
    stepper = make(tmp_path, model, train__micro_batch="auto", reference__kind="cached")
    assert stepper.micro_batch == 4
    stepper.take(1)
    assert stepper.meters.read()["margin"] == 0.0


def test_settings_of_a_reference_that_is_not_used_change_nothing(tmp_path, model):
    """A warning says so."""
    objective = {"name": "sft"}
    one = make(tmp_path / "a", model, objective=objective, reference__kind="cached", reference__draws=1)
    other = make(tmp_path / "b", model, objective=objective)
    for step in range(1, 5):
        one.take(step)
        other.take(step)
    assert one.meters.read() == other.meters.read()


def test_the_largest_micro_batch_that_fits_is_found(tmp_path, model, monkeypatch):
    assert divisors(12) == [12, 6, 4, 3, 2, 1]
    stepper = make(tmp_path, model, train__micro_batch="auto")
    assert stepper.micro_batch == 4
    weights = {name: value.detach().clone() for name, value in stepper.parameters.items()}
    memory = psutil.virtual_memory()

    def found_with(megabytes):
        free = int(megabytes * 2**20)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=free))
        return stepper._largest_micro_batch()

    # a pair keeps 1.2 MiB for its backward pass, and as much again is allowed for
    assert [found_with(megabytes) for megabytes in (64, 6, 3)] == [4, 2, 1]
    with pytest.raises(UserError, match="not even one pair"):
        found_with(0.01)
    assert all(torch.equal(value, weights[name]) for name, value in stepper.parameters.items())
    assert all(value.grad is None for value in stepper.parameters.values())
