"""Estimates against the real thing: a trainer's own step, its allocations and its matrix products."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffpref.config import load_train_config, parse_train_config
from diffpref.data.cache import build_cache
from diffpref.data.pairs import open_pairs
from diffpref.errors import UserError
from diffpref.estimate import GIB, Estimate, Hardware, estimate
from diffpref.estimate.extrapolation import Footprint
from diffpref.estimate.optimizers import optimizer_bytes
from diffpref.estimate.skeleton import make_skeleton
from diffpref.estimate.table import describe
from diffpref.estimate.tracing import cuda_autocast, trace_micro_batch
from diffpref.families import load_family
from diffpref.families.miniature import write_miniature
from diffpref.objectives import OBJECTIVES
from diffpref.paths import share_dir
from diffpref.training.micro_batch import HEADROOM
from diffpref.training.optim import make_optimizer
from diffpref.training.policy import prepare_unet
from diffpref.training.reference import FrozenCopy
from diffpref.training.setup import make_launch
from diffpref.training.stepper import Stepper
from diffpref.training.stop import StopRequest
from tests.miniatures import diffpref_here, rows, write_pairs

MODELS = ("sd15", "sdxl")
TERA = 1e12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: str(write_miniature(folder / name, name)) for name in MODELS} | {"tiny": "tiny:model"}


def settings(base, resolution=64, pairs="nowhere", output="nowhere", **sections):
    """A config; `sections`: further keys by section."""
    tree = {
        "output": str(output),
        "model": {"base": base},
        "data": {"pairs": str(pairs), "resolution": resolution},
        "objective": {"name": "dpo"},
        "train": {"batch_size": 4, "threads": 1},
        "log": {"tensorboard": False},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return parse_train_config(tree)


# ---- against a real training step


@dataclass
class Measured:
    parameters: int
    weights: int  # bytes
    trained: int
    reference: int  # bytes
    optimizer: int  # bytes
    flops: int
    peak: int  # bytes of the micro-batches, gradients included


def real_step(config, folder) -> Measured:
    """The second step of a real trainer: FLOPs as torch counts them, memory as its profiler sees it."""
    launch = make_launch(config)
    family = load_family(config.model)
    prepare_unet(family.unet, config)
    table = open_pairs(config.data.pairs)
    cache = build_cache(table, family, config.data, folder / "cache", False)
    objective = OBJECTIVES[config.objective.name](**config.objective.params)
    stepper = Stepper(config, launch.accelerator, family, objective, cache, launch.strategy, StopRequest())
    stepper.start({}, folder / "cache", None)
    stepper.take(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stepper.take(2)
    # With the plain kernel, whose products torch can count on a CPU; a fused one makes as many.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stepper.take(3)
    reference = stepper.reference
    return Measured(
        parameters=sum(parameter.numel() for parameter in family.unet.parameters()),
        weights=_bytes(family.unet.parameters()),
        trained=sum(parameter.numel() for parameter in stepper.parameters.values()),
        reference=_bytes(reference.unet.parameters()) if isinstance(reference, FrozenCopy) else 0,
        optimizer=_state_bytes(stepper.optimizer),
        flops=counter.get_total_flops(),
        peak=_peak(profiler),
    )


def _peak(profiler) -> int:
    """Of the bytes that the allocator gave out and took back while the profiler watched."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _state_bytes(optimizer) -> int:
    """Each storage once: 8-bit states share their tables."""
    found = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                found[value.data_ptr()] = value.numel() * value.element_size()
    return sum(found.values())


RUNS = {
    "full": ("tiny", {}),
    "accumulating": ("sdxl", {"train": {"micro_batch": 2, "optimizer": "adafactor", "ema_decay": 0.9}}),
    "lora": (
        "sd15",
        {"adapter": {"type": "lora"}, "train": {"mixed_precision": "bf16", "optimizer": "adamw8bit"}},
    ),
    "dora": ("tiny", {"adapter": {"type": "dora"}, "model": {"gradient_checkpointing": True}}),
    "encoding": ("tiny", {"objective": {"name": "mapo"}, "data": {"cache_latents": False}}),
    "cached": ("tiny", {"reference": {"kind": "cached"}, "train": {"micro_batch": 1}}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_estimate_is_what_a_real_step_takes(name, models, tmp_path):
    model, sections = RUNS[name]
    pairs = write_pairs(tmp_path / "pairs.parquet", rows(4))
    config = settings(models[model], pairs=pairs, output=tmp_path / "run", **sections)
    real, found = real_step(config, tmp_path), estimate(config, cuda=False)
    assert (found.parameters, found.trained) == (real.parameters, real.trained)
    assert found.memory["weights"] == real.weights
    assert found.memory["gradients"] == 4 * real.trained
    assert found.memory["reference"] == real.reference
    assert found.memory["optimizer"] == real.optimizer
    assert found.memory["average"] == (4 * real.trained if config.train.ema_decay else 0)
    assert sum(found.flops.values()) * 4 == pytest.approx(real.flops, rel=0.01)
    stays = sum(found.memory[part] for part in ("weights", "reference", "optimizer", "average", "vae"))
    assert found.peak - stays == pytest.approx(real.peak, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_optimizer_states_are_counted_to_the_byte(optimizer):
    shapes = [(7,), (4095,), (4096,), (4097,), (3, 5), (64, 64), (8, 6, 3, 3), (300, 40, 1, 1)]
    weights = {str(shape): torch.nn.Parameter(torch.randn(shape)) for shape in shapes}
    taken = make_optimizer(weights, settings("x", train={"optimizer": optimizer}).train)
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    taken.step()
    assert optimizer_bytes(shapes, optimizer) == _state_bytes(taken)
    small = [(3, 5), (4095,)]
    assert optimizer_bytes(small, optimizer) < optimizer_bytes(shapes, optimizer)


def test_eight_bits_of_small_tensors_only_share_no_table():
    assert optimizer_bytes([(10, 10)], "adamw8bit") == 2 * 4 * 100


# ---- against published figures, at full size


def test_sd15_at_full_size_agrees_with_the_published_figures():
    """859.5M parameters, 0.803 TFLOP a forward pass; Diffusion-DPO takes 8 of them a pair, 6 without a
    reference."""
    found = estimate(settings("architecture:sd15", resolution=512, train={"batch_size": 1}))
    forward = 0.803 * TERA
    assert found.parameters == 859_520_964
    assert found.flops["reference"] == pytest.approx(2 * forward, rel=0.002)
    assert sum(found.flops.values()) == pytest.approx(8 * forward, rel=0.005)
    assert sum(found.flops.values()) - found.flops["reference"] == pytest.approx(6 * forward, rel=0.005)
    copy = found.memory["weights"] / GIB
    assert copy == pytest.approx(3.202, abs=0.001)
    assert found.memory["optimizer"] / GIB == pytest.approx(2 * copy, rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "resolution", "parameters", "forward"),
    [("sd21-base", 512, 866e6, 0.804), ("sd21", 768, 866e6, 2.149), ("sdxl", 1024, 2568e6, 6.761)],
)
def test_other_published_models_at_full_size(name, resolution, parameters, forward):
    found = estimate(settings(f"architecture:{name}", resolution=resolution))
    assert found.parameters == pytest.approx(parameters, rel=0.001)
    assert found.flops["reference"] == pytest.approx(2 * forward * TERA, rel=0.002)
    assert sum(found.flops.values()) == pytest.approx(8 * forward * TERA, rel=0.005)


# ---- how it counts


def trace(config, *counts, cuda=True):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton = make_skeleton(config, mode)
    with mode:
        return skeleton, mode, [trace_micro_batch(skeleton, count, cuda) for count in counts]


def test_two_traces_tell_of_any_number_of_pairs():
    _, _, (one, two, five) = trace(settings("tiny:model", adapter={"type": "dora"}), 1, 2, 5)
    footprint = Footprint(one, two)
    assert footprint.peak(5, accumulates=False) == five.live.max()
    assert footprint.activations(5, False)[0] == (five.live - five.gradients).max()
    assert footprint.flops(5) == five.flops
    assert footprint.peak(2, accumulates=False) == two.live.max()


def test_all_weights_are_fake_tensors_of_one_mode():
    """torch's copy of a fake tensor brings a copy of its mode along, and crashes the interpreter later."""
    config = settings("tiny:model", data={"cache_latents": False})
    skeleton, mode, _ = trace(config)
    assert len(skeleton.networks) == 3
    for network in skeleton.networks:
        for weight in [*network.parameters(), *network.buffers()]:
            assert weight.fake_mode is mode
            assert weight.device.type == "cpu"


def test_mixed_precision_follows_the_rules_of_cuda():
    norm, image = torch.nn.GroupNorm(2, 4), torch.randn(1, 4, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.nn.functional.conv2d(image, torch.randn(4, 4, 1, 1))
        with cuda_autocast():
            assert norm(half).dtype == torch.float32
            assert torch.nn.functional.layer_norm(half, (2,)).dtype == torch.float32
            assert torch.nn.functional.interpolate(half, scale_factor=2.0).dtype == torch.float32
            assert torch.nn.functional.silu(half).dtype == torch.bfloat16
        assert norm(half).dtype == torch.bfloat16
    with cuda_autocast():
        assert torch.nn.functional.interpolate(half, scale_factor=2.0).dtype == torch.bfloat16


def test_lora_leaves_out_gradients_of_frozen_weights_and_cuda_keeps_fp32_inputs_of_norms():
    config = settings("tiny:model", adapter={"type": "lora"}, train={"mixed_precision": "bf16"})
    *_, (found,) = trace(config, 8)
    *_, (on_cpu,) = trace(config, 8, cuda=False)
    assert found.flops == on_cpu.flops
    assert found.flops["forward"] > found.flops["reference"] > 0
    assert found.flops["backward"] < 1.2 * found.flops["forward"]  # twice it with all weights
    assert found.live.max() > 1.1 * on_cpu.live.max()


# ---- micro-batches that fit


def test_the_largest_micro_batch_is_the_largest_that_fits(monkeypatch):
    *_, traces = trace(settings("tiny:model"), 1, 2)
    monkeypatch.setattr("diffpref.estimate.trace_micro_batch", lambda _, pairs, __: traces[pairs - 1])

    def at(micro_batch, gpu_memory=None):
        train = {"batch_size": 24, "micro_batch": micro_batch}
        return estimate(settings("tiny:model", train=train), Hardware(memory=gpu_memory))

    peaks = {size: at(size).peak for size in (6, 8, 12)}
    assert peaks[6] < peaks[8] < peaks[12]
    room = (peaks[8] + 1000) / HEADROOM / GIB
    found = at("auto", room)
    assert (found.largest, found.micro_batch, found.fits, found.peak) == (8, 8, True, peaks[8])
    too_much = at(12, room)
    assert (too_much.largest, too_much.micro_batch, too_much.fits) == (8, 12, False)
    assert "does NOT fit" in describe(too_much)
    assert "micro-batch that does is 8" in describe(too_much)
    none = at("auto", 0.01)
    assert (none.largest, none.micro_batch, none.fits) == (0, 1, False)
    assert "not even one pair" in describe(none)
    assert at("auto").micro_batch == 1


# ---- the command


def run(capsys, *arguments):
    code, errors = diffpref_here("estimate", *arguments)
    return code, capsys.readouterr().out, errors


def test_the_table_adds_up_and_marks_the_biggest_item(capsys):
    code, shown, _ = run(capsys, "tiny-dpo", "--train.ema_decay", "0.9")
    assert code == 0
    assert shown.count("<- the biggest") == 1
    memory, _, compute = (part.splitlines() for part in shown.split("\n\n")[1:4])
    sizes = {line[:20].strip(): float(line[20:30]) for line in memory[1:]}
    total = sizes.pop("total")
    assert {"weights", "gradients", "optimizer state", "moving average", "reference"} < set(sizes)
    assert sum(sizes.values()) == pytest.approx(total, abs=0.0005)
    assert "activations" in next(line for line in memory if "biggest" in line)
    assert {len(line) for line in compute} == {len(compute[0])}
    *parts, whole = (float(line.split()[-1]) for line in compute[1:])
    assert sum(parts) == pytest.approx(whole, abs=0.00001)


def test_json_has_every_number(capsys):
    code, shown, _ = run(capsys, "tiny-mapo", "--json", "--gpu-memory", "2", "--train.micro_batch", "auto")
    found = json.loads(shown)
    assert code == 0
    memory = found["memory"]
    assert memory.pop("peak") == sum(memory.values())
    assert memory["reference"] == found["flops_per_pair"]["reference"] == 0
    assert found["fits"] is True
    assert found["gpu_memory"] == 2 * GIB
    assert found["micro_batch"] == found["largest_micro_batch"] > 0
    ratio = found["flops_per_step"]["total"] / found["flops_per_pair"]["total"]
    assert ratio == pytest.approx(found["batch_size"])


RECIPES = sorted(path.stem for path in (share_dir("configs") / "train").glob("*.toml"))


TRACED: dict[str, Estimate] = {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_can_be_estimated(recipe, models):
    """On the miniature of its family, with its own precision, checkpointing, adapter and objective."""
    base = models["sdxl" if recipe.startswith("sdxl") else "sd15" if recipe.startswith("sd") else "tiny"]
    changes = [
        ("model.base", base),
        ("data.resolution", "64"),
        ("train.batch_size", "8"),
        ("train.micro_batch", "0"),
    ]
    config = load_train_config(share_dir("configs") / "train" / f"{recipe}.toml", changes)
    # Recipes that differ in their lengths and rates alone are the same to an estimate: one trace for all.
    loop = config.train
    traced = repr((
        config.model, config.adapter, config.reference, config.objective.name, loop.mixed_precision,
        loop.optimizer, loop.ema_decay > 0, config.data.cache_latents,
    ))  # fmt: skip
    if traced not in TRACED:
        TRACED[traced] = estimate(config, Hardware(gpus=2, memory=8, tflops=100))
    found = TRACED[traced]
    assert found.peak > 0
    assert found.flops["backward"] > found.flops["forward"] > 0
    assert found.hours > 0
    assert describe(found)


def test_checkpointing_in_half_precision_computes_the_forward_pass_again(models):
    """Once more the forward pass of what is checkpointed, in the types of the first time."""
    flops = {}
    for checkpointing in (False, True):
        model = {"base": models["sd15"], "gradient_checkpointing": checkpointing}
        train = {"batch_size": 4, "mixed_precision": "bf16", "threads": 1}
        flops[checkpointing] = estimate(settings("", model=model, train=train)).flops
    again = flops[True]["backward"] - flops[False]["backward"]
    assert flops[True]["forward"] == flops[False]["forward"]
    assert 0.6 * flops[True]["forward"] < again <= flops[True]["forward"]


def test_disk_gpus_and_hours_by_hand(models):
    """Full fine-tuning with AdamW: a checkpoint is the weights three times over, in fp32."""
    train = {"batch_size": 8, "steps": 100, "threads": 1}
    config = settings(models["sd15"], train=train, checkpoint={"keep": 3})
    found = estimate(config, Hardware(gpus=2, tflops=50, share=0.5))
    assert found.micro_batch == 4  # each GPU's part of the batch
    tensors = 440  # each with its count of steps
    assert found.disk["checkpoint"] == 3 * 4 * found.parameters + 4 * tensors
    assert found.disk["checkpoints"] == 4 * found.disk["checkpoint"]
    assert found.disk["model"] == 4 * found.parameters
    assert found.disk["latents"] == 2 * 2 * (4 * 8 * 8) * 4 + 136  # two images, mean and log-variance, fp32
    flops = 100 * 8 * sum(found.flops.values())
    assert found.hours == pytest.approx(flops / (2 * 50e12 * 0.5) / 3600)
    assert estimate(config).hours is None
    with pytest.raises(UserError, match="does not split evenly over 3 GPUs"):
        estimate(config, Hardware(gpus=3))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu-memory", "-1"], "--gpu-memory -1 is not allowed"),
        (["--gpu-memory", "nan"], "--gpu-memory nan is not allowed"),
        (["--gpu-memory", "much"], "invalid float value"),
        (["--tflops", "0"], "--tflops 0 is not allowed"),
        (["--share", "1.5"], "--share 1.5 is not allowed"),
        (["--gpus", "0"], "must be at least 1"),
        (["--gpu-memry", "1"], "did you mean --gpu-memory?"),
        (["--model.base", "architecture:sdx"], "did you mean 'architecture:sdxl'?"),
        (["--model.base", "architecture:sdxl", "--model.family", "sd"], "its text encoders, resolution"),
        (["--model.base", "no-such/model"], "architecture:sd15"),
        (["--model.base", "/nowhere/model"], "/nowhere"),
        (["--adapter.type", "lora", "--adapter.target_modules", '["to_w"]'], "did you mean 'to_"),
        (["--data.resolution", "72"], "data.resolution = 72 does not fit the model"),
        (["--train.max_timestep", "1000"], "beyond the model's last timestep"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_2(arguments, expected, capsys):
    code, shown, errors = run(capsys, "tiny-dpo", *arguments)
    assert (code, shown) == (2, "")
    assert expected in errors
    assert "Traceback" not in errors


def test_of_a_hub_model_only_configs_are_fetched(models, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        files = [str(path.relative_to(models["sd15"])) for path in Path(models["sd15"]).rglob("*.*")]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(models["sd15"]) / file, tmp_path / file)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    sections = {"model": {"base": "org/name", "revision": "v1"}, "train": {"micro_batch": "auto"}}
    found = estimate(settings("", **sections))
    assert asked == [("org/name", "v1")]
    assert not list(tmp_path.rglob("*.safetensors"))
    weights = Path(models["sd15"], "unet", "diffusion_pytorch_model.safetensors").stat().st_size
    assert found.memory["weights"] == pytest.approx(weights, rel=0.05)  # a header comes on top
    assert found.micro_batch == 1


def test_a_unet_of_another_task_is_refused(models, tmp_path):
    shutil.copytree(models["sd15"], tmp_path / "model")
    file = tmp_path / "model" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 9}))
    with pytest.raises(UserError, match="takes 9 channels"):
        estimate(settings(str(tmp_path / "model")))


def test_help_teaches(capsys):
    code, shown, _ = run(capsys, "--help")
    assert code == 0
    for expected in ("--gpu-memory GIB", "architecture:NAME", "--train.micro_batch", "--json"):
        assert expected in shown


@pytest.mark.slow
def test_the_process_ends_well():
    """In one of its own, as fake tensors could take the interpreter down when it ends."""
    command = [sys.executable, "-m", "diffpref", "estimate", "tiny-dpo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
