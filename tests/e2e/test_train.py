"""`diffpref train` through the real command line: what it leaves behind, resuming, and every kind of bad
input."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffpref import cli
from diffpref.families.miniature import stable_diffusion
from diffpref.paths import new_file_mode
from tests.forked import start
from tests.miniatures import (
    config,
    diffpref_here,
    metrics,
    rows,
    write_config,
    write_pairs,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A miniature model, training pairs and held-out pairs."""
    folder = tmp_path_factory.mktemp("world")
    stable_diffusion(folder / "model")
    write_pairs(folder / "pairs.parquet", rows(24))
    write_pairs(folder / "held.parquet", rows(6, first=50))
    return folder


def run(world, tmp_path, name="run", expect=0, **changes):
    """Train by the command's entry point; returns the run folder and what was printed on stderr."""
    tree = config(world / "model", world / "pairs.parquet", tmp_path / name, **changes)
    code, printed = diffpref_here("train", write_config(tmp_path / f"{name}.toml", tree))
    assert code == expect, printed
    return tmp_path / name, printed


def weights(folder):
    return load_file(folder / "model/unet/diffusion_pytorch_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def modes(folder):
    """Permissions of all files below."""
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


FULL = {
    "data__captions": "dual", "data__prompt_dropout": 0.2, "data__flip": "shared", "train__ema_decay": 0.9,
    "train__warmup_steps": 2, "train__schedule": "cosine", "train__micro_batch": 2, "log__every": 4,
    "log__tensorboard": True, "sampling__count": 2, "sampling__every": 3, "sampling__steps": 2,
    "validation__every": 3, "validation__pairs": 4, "validation__draws": 2,
}  # fmt: skip


def full(world):
    return FULL | {"data__validation": str(world / "held.parquet")}


def test_a_run_with_everything_on_leaves_what_is_promised(world, tmp_path):
    folder, printed = run(world, tmp_path, **full(world))
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "base.png",
        "step-3.png",
        "step-6.png",
    ]
    with Image.open(folder / "samples/step-6.png") as grid:
        assert grid.width > 2 * 128
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert list((folder / "tensorboard").iterdir())
    table = metrics(folder)
    assert [row["step"] for row in table if "validation" not in row] == [1, 4, 6]
    assert [row["step"] for row in table if "validation" in row] == [3, 6]
    first = table[0]
    assert first["margin"] == first["winner_gain"] == first["loser_gain"] == 0.0
    assert first["implicit_accuracy"] == 0.5
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["learning_rate"] == pytest.approx(5e-4)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["threads"] == 1
    assert manifest["world_size"] == 1
    assert manifest["data"]["train"]["pairs"] == 24
    assert modes(folder) == {new_file_mode()}
    assert "pairs/s" in printed
    assert "peak memory" in printed
    assert (folder / "model/README.md").exists()


def test_the_model_loads_in_plain_diffusers(world, tmp_path):
    from diffusers import StableDiffusionPipeline

    folder, _ = run(world, tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model")
    images = pipeline("red", num_inference_steps=2, height=32, width=32, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    checkpoint = load_file(folder / "checkpoints/step-6/weights.safetensors")
    assert same(checkpoint, dict(pipeline.unet.state_dict()))


def test_the_trained_model_is_not_the_base_and_averaged_weights_are_exported(world, tmp_path):
    plain, _ = run(world, tmp_path, "plain")
    averaged, _ = run(world, tmp_path, "averaged", train__ema_decay=0.9)
    base = load_file(world / "model/unet/diffusion_pytorch_model.safetensors")
    assert not same(weights(plain), base)
    assert same(weights(averaged), load_file(averaged / "checkpoints/step-6/average.safetensors"))
    assert not same(weights(averaged), weights(plain))


def test_a_stopped_run_resumes_to_the_same_bits(world, tmp_path):
    """Everything random or stateful is on; one run is stopped by SIGTERM in the middle, the other is not."""
    changes = full(world) | {
        "train__steps": 40,
        "checkpoint__every": 0,
        "sampling__every": 0,
        "validation__every": 10,
    }
    whole, _ = run(world, tmp_path, "whole", **changes)
    tree = config(world / "model", world / "pairs.parquet", tmp_path / "stopped", **changes)
    path = write_config(tmp_path / "stopped.toml", tree)
    process = start(tmp_path / "log", "train", path)
    rows_file = tmp_path / "stopped/metrics.jsonl"
    while process.running() and not (rows_file.exists() and rows_file.read_text().count("\n") >= 2):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    assert "continues the run" in process.finish()
    assert not (tmp_path / "stopped/model").exists()
    assert len(list((tmp_path / "stopped/checkpoints").iterdir())) == 1
    assert "continuing" in start(tmp_path / "log", "train", path).finish()
    assert metrics(tmp_path / "stopped") == metrics(whole)
    assert same(weights(tmp_path / "stopped"), weights(whole))
    for name in ("weights", "optimizer", "average"):
        file = f"checkpoints/step-40/{name}.safetensors"
        assert same(load_file(tmp_path / "stopped" / file), load_file(whole / file))


def test_a_finished_run_is_left_alone_and_can_be_made_longer(world, tmp_path):
    folder, _ = run(world, tmp_path)
    stamp = (folder / "model/model_index.json").stat().st_mtime_ns
    _, printed = run(world, tmp_path)
    assert "is finished" in printed
    assert (folder / "model/model_index.json").stat().st_mtime_ns == stamp
    run(world, tmp_path, train__steps=8)
    longer, _ = run(world, tmp_path, "longer", train__steps=8)
    assert metrics(folder) == metrics(longer)
    assert same(weights(folder), weights(longer))


def test_micro_batches_do_not_change_the_result(world, tmp_path):
    one, _ = run(world, tmp_path, "one")
    four, _ = run(world, tmp_path, "four", train__micro_batch=1)
    for a, b in zip(metrics(one), metrics(four), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["margin"] == pytest.approx(b["margin"], abs=1e-5)


def test_gradient_checkpointing_does_not_change_the_result(world, tmp_path):
    plain, _ = run(world, tmp_path, "plain")
    again, _ = run(world, tmp_path, "again", model__gradient_checkpointing=True)
    for a, b in zip(metrics(plain), metrics(again), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{"train__mixed_precision": "bf16"}, {"model__gradient_checkpointing": True}]
)
def test_first_margin_is_exactly_zero(world, tmp_path, changes):
    folder, _ = run(world, tmp_path, train__steps=2, **changes)
    assert metrics(folder)[0]["margin"] == 0.0
    assert metrics(folder)[1]["margin"] != 0.0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_lora_starts_at_the_base_loads_in_diffusers_and_acts_with_its_alpha(world, tmp_path, precision):
    from diffusers import StableDiffusionPipeline

    folder, _ = run(
        world, tmp_path, adapter__type="lora", adapter__rank=4, adapter__alpha=16.0,
        train__learning_rate=1e-2,
        train__mixed_precision=precision,
    )  # fmt: skip
    first = metrics(folder)[0]
    assert first["margin"] == first["winner_gain"] == 0.0
    assert sorted(path.name for path in (folder / "model").iterdir()) == [
        "README.md", "diffpref.json", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    pipeline = StableDiffusionPipeline.from_pretrained(world / "model")
    draw = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    base = pipeline("red", generator=torch.Generator().manual_seed(0), **draw).images
    pipeline.load_lora_weights(folder / "model")
    aligned = pipeline("red", generator=torch.Generator().manual_seed(0), **draw).images
    assert abs(base - aligned).max() > 0
    layer = next(module for module in pipeline.unet.modules() if hasattr(module, "lora_A"))
    assert list(layer.scaling.values()) == [4.0]  # alpha / rank
    saved = load_file(folder / "checkpoints/step-6/weights.safetensors")
    assert all("lora" in name for name in saved)
    assert modes(folder) == {new_file_mode()}
    header = (folder / "model/pytorch_lora_weights.safetensors").read_bytes()
    described = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert list(described) == sorted(described) == ["format", "lora_adapter_metadata"]


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw8bit"])
def test_other_optimizers_continue_to_the_same_bits(world, tmp_path, optimizer):
    changes = {"train__optimizer": optimizer, "checkpoint__every": 0}
    folder, _ = run(world, tmp_path, train__steps=3, **changes)
    run(world, tmp_path, train__steps=6, **changes)
    whole, _ = run(world, tmp_path, "whole", train__steps=6, **changes)
    # the row of the last step of the shorter run is there in both, and nothing else differs
    assert metrics(folder) == metrics(whole)
    assert same(weights(folder), weights(whole))
    assert not same(weights(folder), load_file(world / "model/unet/diffusion_pytorch_model.safetensors"))


def test_a_run_stops_early_with_its_best_weights_and_stays_finished(world, tmp_path):
    changes = {
        "data__validation": str(world / "held.parquet"), "validation__every": 2, "validation__patience": 2,
        "validation__monitor": "loss", "train__steps": 60, "train__learning_rate": 1e-2,
        "checkpoint__every": 2, "checkpoint__keep": 40,
    }  # fmt: skip
    folder, printed = run(world, tmp_path, **changes)
    measured = {row["step"]: row["validation"]["loss"] for row in metrics(folder) if "validation" in row}
    best = min(measured, key=measured.get)
    last = max(measured)
    assert last == best + 4 < 60
    assert f"best at step {best}" in printed
    assert same(weights(folder), load_file(folder / f"checkpoints/step-{best}/weights.safetensors"))
    _, printed = run(world, tmp_path, **changes)
    assert "is finished" in printed
    for step in range(best + 1, last + 1):  # a kill after the best one: the weights to export survive it
        shutil.rmtree(folder / f"checkpoints/step-{step}", ignore_errors=True)
    shutil.rmtree(folder / "model")
    run(world, tmp_path, **changes)
    assert same(weights(folder), load_file(folder / f"checkpoints/step-{best}/weights.safetensors"))


def test_a_run_with_patience_can_be_made_longer(world, tmp_path):
    changes = {
        "data__validation": str(world / "held.parquet"), "validation__every": 2, "validation__patience": 9,
    }  # fmt: skip
    run(world, tmp_path, train__steps=2, **changes)
    folder, printed = run(world, tmp_path, train__steps=4, **changes)
    assert "is finished" not in printed
    assert metrics(folder)[-1]["step"] == 4


def test_a_longer_run_takes_the_reference_errors_that_it_lacks(world, tmp_path):
    run(world, tmp_path, train__steps=3, reference__kind="cached")
    folder, _ = run(world, tmp_path, train__steps=6, reference__kind="cached")
    whole, _ = run(world, tmp_path, "whole", train__steps=6, reference__kind="cached")
    assert [row["loss"] for row in metrics(folder)] == [row["loss"] for row in metrics(whole)]


@pytest.mark.parametrize("damage", ["cut", "a changed value", "empty"])
def test_damaged_reference_errors_are_taken_again(world, tmp_path, damage):
    changes = {"reference__kind": "cached", "data__cache_dir": str(tmp_path / "cache")}
    first, _ = run(world, tmp_path, "first", **changes)
    (path,) = (tmp_path / "cache").glob("reference-*/*.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "a changed value":
        data[-1] ^= 64
        path.write_bytes(bytes(data))
    else:
        path.write_bytes(data[:100] if damage == "cut" else b"")
    second, printed = run(world, tmp_path, "second", **changes)
    assert "is damaged" in printed
    assert "taken again" in printed
    assert same(weights(first), weights(second))
    _, printed = run(world, tmp_path, "third", **changes)
    assert "is damaged" not in printed


def test_two_runs_that_begin_one_cache_together_both_train(world, tmp_path):
    """As in a sweep: one encodes, the other waits and finds it finished."""
    changes = {"data__cache_dir": str(tmp_path / "cache"), "reference__kind": "cached"}
    starts = []
    for name in ("a", "b", "c"):
        tree = config(world / "model", world / "pairs.parquet", tmp_path / name, **changes)
        starts.append(start(tmp_path / f"{name}.log", "train", write_config(tmp_path / f"{name}.toml", tree)))
    for one in starts:
        assert one.wait() == 0, one.printed()
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_grids_are_scored_when_asked(world, tmp_path):
    folder, _ = run(
        world, tmp_path, sampling__every=3, sampling__steps=2, sampling__evaluators=["oracle"],
        sampling__prompts=["a red circle", "a blue square"],
    )  # fmt: skip
    scored = [row for row in metrics(folder) if "scores" in row]
    assert [row["step"] for row in scored] == [3, 6]
    assert scored[0]["scores"].keys() == {"oracle", "base_oracle"}
    assert scored[0]["scores"]["base_oracle"] == scored[1]["scores"]["base_oracle"]


def test_latents_that_are_not_cached_train_the_same(world, tmp_path):
    cached, _ = run(world, tmp_path, "cached", data__flip="shared")
    live, _ = run(world, tmp_path, "live", data__flip="shared", data__cache_latents=False)
    assert not (live / "cache/train/latents").exists()
    for a, b in zip(metrics(cached), metrics(live), strict=True):
        # the loss sees what rounding does to the margin, up to 5e-6, times beta
        assert a["loss"] == pytest.approx(b["loss"], abs=200 * 5e-6)
        assert a["winner_error"] == pytest.approx(b["winner_error"], rel=1e-5)


def test_a_bad_image_met_while_training_is_replaced_captions_and_all(world, tmp_path):
    table = rows(12)
    table[5]["jpg_0"] = table[5]["jpg_0"][:60]
    pairs = write_pairs(tmp_path / "pairs.parquet", table)
    settings = {"data__pairs": str(pairs), "data__cache_latents": False, "data__max_bad_share": 0.2}
    folder, _ = run(world, tmp_path, **settings, data__crop="random")
    assert len(metrics(folder)) == 6
    folder, printed = run(world, tmp_path, "strict", expect=2, **settings | {"data__max_bad_share": 0.01})
    assert "row 5" in printed


@pytest.mark.parametrize("name", ["sft", "mapo"])
def test_reference_free_objectives_run_without_a_reference(world, tmp_path, name):
    folder, _ = run(world, tmp_path, objective={"name": name}, data__validation=str(world / "held.parquet"))
    table = metrics(folder)
    assert "margin" not in table[0]
    assert table[0]["winner_error"] > 0
    assert "margin" in table[-1]["validation"]  # the held-out measurement has the base model's errors


def bad_rows(kind):
    table = rows(8)
    if kind == "ties":
        for row in table:
            row["label_0"] = 0.5
    elif kind == "nan label":
        table[3]["label_0"] = float("nan")
    elif kind == "label outside":
        table[3]["label_0"] = 1.5
    elif kind == "truncated":
        table[3]["jpg_0"] = table[3]["jpg_0"][:60]
    elif kind == "empty bytes":
        table[3]["jpg_0"] = b""
    elif kind == "null caption":
        table[3]["caption"] = None
    elif kind == "no column":
        for row in table:
            del row["jpg_1"]
    return table


@pytest.mark.parametrize(
    "kind", ["ties", "nan label", "label outside", "truncated", "empty bytes", "null caption", "no column"]
)
def test_bad_pairs_are_one_message_and_nothing_is_written(world, tmp_path, kind):
    path = write_pairs(tmp_path / "bad.parquet", bad_rows(kind))
    folder, printed = run(world, tmp_path, expect=2, data__pairs=str(path))
    assert "error:" in printed
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__base": "nowhere/at/all"}, "model folder not found"),
        ({"data__pairs": "nowhere.parquet"}, "no pairs at"),
        ({"train__mixed_precision": "fp16"}, "fp16"),
        ({"data__resolution": 40}, "multiple of 16"),
        ({"train__max_timestep": 1000}, "max_timestep"),
        ({"adapter__type": "lora", "adapter__target_modules": ["to_qq"]}, "did you mean 'to_q'"),
        ({"train__micro_batch": 3}, "micro_batch"),
        ({"log__wandb": True}, "wandb"),
        ({"train__step": 3}, "did you mean train.steps"),
        ({"model__attention": "xformers"}, "xformers"),
        ({"model__family": "sdxl"}, 'model.family is "sdxl"'),
        ({"model__vae": "nowhere/at/all"}, "VAE (model.vae) not found"),
        ({"data__crop": "random"}, "data.cache_latents = false"),
        (
            {"data__crop": "random", "data__cache_latents": False, "reference__kind": "cached"},
            'data.crop = "random"',
        ),
        ({"reference__kind": "adapter"}, "there is no adapter to switch off"),
        ({"data__aspect": "buckets", "data__cache_latents": False}, "which rectangle a pair belongs to"),
        ({"validation__patience": 2}, "set validation.every"),
        ({"sampling__evaluators": ["oracel"], "sampling__count": 2}, "oracle"),
        ({"sampling__evaluators": ["oracle"], "sampling__count": 2}, "cannot read the prompt 'red'"),
        ({"export__push_to_hub": "my-model"}, "org/name"),
        ({"export__push_to_hub": "me/my-model"}, "hf auth login"),
    ],
)
def test_bad_settings_are_one_message_and_nothing_is_written(world, tmp_path, changes, message):
    folder, printed = run(world, tmp_path, expect=2, **changes)
    assert message in printed
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__attention": "xformers"}, "xformers"),
        ({"train__mixed_precision": "fp16"}, "fp16"),
        ({"data__crop": "random"}, "data.cache_latents = false"),
        ({"data__captions": "dual"}, "caption_0"),
        ({"model__family": "sdxl"}, 'model.family is "sdxl"'),
        ({"adapter__type": "lora", "adapter__target_modules": ["to_qq"]}, "did you mean 'to_q'"),
    ],
)
def test_wrong_combinations_are_told_before_any_weights_are_read(world, tmp_path, changes, message):
    """The model's weight files are not even there."""
    model = stable_diffusion(tmp_path / "model")
    for weights_file in model.rglob("*.safetensors"):
        weights_file.unlink()
    table = rows(8)
    for row in table:
        del row["caption_0"], row["caption_1"]
    pairs = write_pairs(tmp_path / "pairs.parquet", table)
    folder, printed = run(
        world, tmp_path, expect=2, **{"model__base": str(model), "data__pairs": str(pairs)} | changes
    )
    assert message in printed
    assert printed.count("error:") == 1
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["index", "weights", "part"])
def test_a_damaged_model_folder_is_one_message(tmp_path, damage):
    model = stable_diffusion(tmp_path / "model")
    if damage == "index":
        (model / "model_index.json").unlink()
    elif damage == "weights":
        file = model / "unet/diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
    else:
        for file in (model / "vae").iterdir():
            file.unlink()
    write_pairs(tmp_path / "pairs.parquet", rows(8))
    tree = config(model, tmp_path / "pairs.parquet", tmp_path / "run")
    code, printed = diffpref_here("train", write_config(tmp_path / "c.toml", tree))
    assert code == 2, printed
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_config_is_refused_and_untouched(world, tmp_path):
    folder, _ = run(world, tmp_path, train__steps=2)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    _, printed = run(world, tmp_path, expect=2, train__steps=2, train__learning_rate=2e-3)
    assert "train.learning_rate: 0.001 -> 0.002" in printed
    _, printed = run(world, tmp_path, expect=2, train__steps=2, checkpoint__resume="never")
    assert "holds a run already" in printed
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_changed_pairs_are_refused_on_resume(world, tmp_path):
    path = write_pairs(tmp_path / "pairs.parquet", rows(8))
    run(world, tmp_path, data__pairs=str(path), train__steps=2)
    write_pairs(path, rows(9))
    _, printed = run(world, tmp_path, expect=2, data__pairs=str(path), train__steps=4)
    assert "inputs" in printed


def test_a_named_cache_of_another_model_is_refused(world, tmp_path):
    cache = str(tmp_path / "cache")
    tree = config(world / "model", world / "pairs.parquet", tmp_path / "run", data__cache_dir=cache)
    assert diffpref_here("encode", write_config(tmp_path / "c.toml", tree))[0] == 0
    assert not (tmp_path / "run").exists()
    other = stable_diffusion(tmp_path / "other", seed=1)
    _, printed = run(world, tmp_path, expect=2, data__cache_dir=cache, model__base=str(other))
    assert "made for something else" in printed
    run(world, tmp_path, data__cache_dir=cache)


def on_a_full_disk(arguments):
    """No file may be larger than 100 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return cli.main(arguments)


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(world, tmp_path):
    """The limit on file size stands for a full disk: LoRA weights of step 2 fit, a grown metrics file is not
    hit."""
    folder, _ = run(world, tmp_path, train__steps=2)
    tree = config(world / "model", world / "pairs.parquet", folder, train__steps=4)
    path = write_config(tmp_path / "full.toml", tree)
    done = start(tmp_path / "log", "train", path, main=on_a_full_disk)
    assert done.wait() == 2, done.printed()
    assert "no room on the disk" in done.printed()
    assert os.listdir(folder / "checkpoints") == ["step-2"]
    start(tmp_path / "log", "train", path).finish()
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_stops_before_the_step(world, tmp_path):
    # at step 1 the margin is 0 and the loss is log 2, but its gradient is beyond fp32
    folder, printed = run(
        world, tmp_path, expect=2, objective__beta=1e38, train__steps=4, checkpoint__every=1
    )
    assert "the gradient of step 1 is not finite" in printed
    assert "ids" in printed
    assert not (folder / "checkpoints").exists()
    assert not (folder / "model").exists()


def test_two_processes_cannot_train_in_one_folder(world, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    lock = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    _, printed = run(world, tmp_path, expect=2)
    os.close(lock)
    assert "another process" in printed
