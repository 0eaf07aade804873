"""Which weights a name means: revisions, variants, LoRAs and their bases; models that lack something."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from diffpref.config import ModelConfig
from diffpref.errors import UserError
from diffpref.families import load_family
from diffpref.families.loading import part_variant
from diffpref.families.miniature import stable_diffusion, write_miniature
from diffpref.pipelines import load_pipeline
from tests.miniatures import config, diffpref_here, rows, write_config, write_pairs

UNET = "unet/diffusion_pytorch_model.safetensors"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


def change(file: Path, factor: float = 0.5) -> None:
    weights = load_file(file)
    weights = {k: (v * factor if k.startswith("conv_out") else v).contiguous() for k, v in weights.items()}
    save_file(weights, file, {"format": "pt"})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A miniature, the same with fp16 files alone, and a hub cache of acme/toy, whose branches differ."""
    folder = tmp_path_factory.mktemp("world")
    base = stable_diffusion(folder / "base")
    StableDiffusionPipeline.from_pretrained(base).to(torch.float16).save_pretrained(
        folder / "fp16", variant="fp16"
    )
    repo = folder / "hub" / "models--acme--toy"
    (repo / "refs").mkdir(parents=True)
    for branch, commit in COMMITS.items():
        shutil.copytree(base, repo / "snapshots" / commit)
        (repo / "refs" / branch).write_text(commit)
    change(repo / "snapshots" / COMMITS["v2"] / UNET)
    write_pairs(folder / "pairs.parquet", rows(8))
    return folder


@pytest.fixture(autouse=True)
def cached_hub(world, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world / "hub"))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_OFFLINE", True, raising=False)


def train(world, out: Path, base: str, adapter: str = "lora", **changes) -> None:
    tree = config(
        base, world / "pairs.parquet", out, train__steps=2, train__learning_rate=1e-2, adapter__type=adapter,
        **changes,
    )  # fmt: skip
    code, printed = diffpref_here("train", write_config(out.with_suffix(".toml"), tree))
    assert code == 0, printed


def draw(world, out: Path, *arguments, expect: int = 0) -> str:
    prompts = world / "prompts.txt"
    prompts.write_text("red\n")
    code, printed = diffpref_here(
        "generate",
        "--suite",
        prompts,
        "--steps",
        2,
        "--size",
        "32x32",
        "--guidance",
        3,
        "--scheduler",
        "ddim",
        "--seeds",
        0,
        "--out",
        out,
        *arguments,
    )
    assert code == expect, printed
    return printed


def pixels(folder: Path) -> bytes:
    (file,) = sorted((folder / "images").iterdir())
    with Image.open(file) as image:
        return image.tobytes()


def snapshot(world, branch: str) -> Path:
    return world / "hub/models--acme--toy/snapshots" / COMMITS[branch]


def test_a_lora_is_drawn_on_the_revision_that_it_was_trained_on(world, tmp_path):
    train(world, tmp_path / "run", "acme/toy", model__revision="v2")
    about = json.loads((tmp_path / "run/model/diffpref.json").read_text())
    assert (about["base"], about["revision"], about["commit"]) == ("acme/toy", "v2", COMMITS["v2"])
    draw(world, tmp_path / "mine", "--model", tmp_path / "run")
    lora = tmp_path / "run/model"
    draw(world, tmp_path / "right", "--model", snapshot(world, "v2"), "--lora", lora)
    said = draw(world, tmp_path / "wrong", "--model", "acme/toy", "--lora", lora)
    assert "was trained on another base than acme/toy: another UNet" in said
    assert pixels(tmp_path / "mine") == pixels(tmp_path / "right") != pixels(tmp_path / "wrong")
    same = draw(world, tmp_path / "named", "--model", "acme/toy", "--revision", "v2", "--lora", lora)
    assert "another base" not in same
    assert pixels(tmp_path / "named") == pixels(tmp_path / "mine")
    assert "which says itself" in draw(
        world, tmp_path / "x", "--model", tmp_path / "run", "--revision", "main", expect=2
    )


def test_a_base_that_was_overwritten_is_refused_and_one_that_was_moved_is_not(world, tmp_path):
    base = Path(shutil.copytree(world / "base", tmp_path / "base"))
    train(world, tmp_path / "run", str(base))
    draw(world, tmp_path / "before", "--model", tmp_path / "run/model")
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    change(base / UNET)
    refused = draw(world, tmp_path / "after", "--model", tmp_path / "run/model", expect=2)
    assert "is not the model that the LoRA" in refused
    assert "UNet has other weights" in refused
    assert not (tmp_path / "after").exists()
    refused = diffpref_here(
        "accuracy", "--model", tmp_path / "run/model", "--pairs", world / "pairs.parquet", "--draws", 1,
        "--resolution", 32, "--out", tmp_path / "a.json",
    )  # fmt: skip
    assert refused[0] == 2, refused[1]
    assert "LoRA" in refused[1]
    said = draw(world, tmp_path / "there", "--model", moved, "--lora", tmp_path / "run/model")
    assert "another base" not in said
    assert pixels(tmp_path / "there") == pixels(tmp_path / "before")


def test_the_reference_of_a_full_model_must_be_what_it_was_trained_from(world, tmp_path):
    base = Path(shutil.copytree(world / "base", tmp_path / "base"))
    train(world, tmp_path / "run", str(base), adapter="none")
    change(base / UNET)
    code, printed = diffpref_here(
        "accuracy", "--model", tmp_path / "run", "--pairs", world / "pairs.parquet", "--draws", 1,
        "--resolution", 32, "--out", tmp_path / "a.json",
    )  # fmt: skip
    assert code == 2, printed
    assert "has changed since" in printed


def test_an_export_that_does_not_know_its_base_is_drawn_with_a_word(world, tmp_path):
    train(world, tmp_path / "run", str(world / "base"))
    about = tmp_path / "run/model/diffpref.json"
    about.write_text(json.dumps({"base": str(world / "base"), "adapter": "lora", "step": 2}))
    assert "does not say which weights" in draw(world, tmp_path / "out", "--model", tmp_path / "run")


@pytest.mark.parametrize("arguments", [(), ("--variant", "fp16")])
def test_a_model_with_fp16_files_alone_is_drawn(world, tmp_path, arguments):
    draw(world, tmp_path / "out", "--model", world / "fp16", *arguments)
    assert pixels(tmp_path / "out")


def test_a_model_with_fp16_files_alone_is_trained_drawn_and_measured(world, tmp_path):
    train(world, tmp_path / "run", str(world / "fp16"), model__variant="fp16")
    draw(world, tmp_path / "out", "--model", tmp_path / "run/model")
    code, printed = diffpref_here(
        "accuracy", "--model", tmp_path / "run", "--pairs", world / "pairs.parquet", "--draws", 1,
        "--resolution", 32, "--out", tmp_path / "a.json",
    )  # fmt: skip
    assert code == 0, printed
    train(world, tmp_path / "full", str(world / "fp16"), adapter="none")
    draw(world, tmp_path / "full-out", "--model", tmp_path / "full")


def test_a_variant_applies_to_the_parts_that_have_it(world, tmp_path):
    mixed = Path(shutil.copytree(world / "base", tmp_path / "mixed"))
    (mixed / UNET).unlink()
    shutil.copy(world / "fp16/unet/diffusion_pytorch_model.fp16.safetensors", mixed / "unet")
    draw(world, tmp_path / "out", "--model", mixed, "--variant", "fp16")
    family = load_family(ModelConfig(base=str(mixed), variant="fp16"))
    assert next(family.unet.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("names", "wanted", "variant"),
    [
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "fp16"),
        (["model.safetensors", "model.fp16.safetensors"], "", None),
        (["model.safetensors"], "fp16", None),
        (["pytorch_model.fp16.bin"], "", "fp16"),
        (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bf16.safetensors"], "", None),
        (["diffusion_pytorch_model-00001-of-00002.fp16.safetensors"], "", "fp16"),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], "", "fp16"),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], "", None),
        (["model.non_ema.safetensors", "model.safetensors"], "non_ema", "non_ema"),
    ],
)
def test_variants_are_read_from_the_names_of_the_files(tmp_path, names, wanted, variant):
    for name in [*names, "config.json"]:
        (tmp_path / name).write_text("")
    assert part_variant(tmp_path, wanted) == variant


NETWORKS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model",
}  # fmt: skip


@pytest.fixture(scope="module")
def xl(tmp_path_factory) -> Path:
    return write_miniature(tmp_path_factory.mktemp("xl") / "model", "sdxl")


@pytest.mark.parametrize("part", NETWORKS)
def test_a_missing_tensor_is_refused_and_not_drawn_at_random(xl, tmp_path, part):
    model = Path(shutil.copytree(xl, tmp_path / "model"))
    file = model / part / f"{NETWORKS[part]}.safetensors"
    weights = load_file(file)
    gone = sorted(weights)[5]
    del weights[gone]
    save_file(weights, file, {"format": "pt"})
    for load in (lambda: load_family(ModelConfig(base=str(model))), lambda: load_pipeline(str(model))):
        with pytest.raises(UserError, match=f"cannot load the {part} of") as caught:
            load()
        assert caught.value.why.startswith("1 of its weights are missing: ")
        assert caught.value.why.endswith(gone.removeprefix("text_model."))


DAMAGES = (
    "cut", "empty", "pointer", "config list", "config odd", "no config", "no tokenizer", "pickle", "shape",
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_damaged_model_is_one_clear_error(world, tmp_path, part, damage):
    model = Path(shutil.copytree(world / "base", tmp_path / "model"))
    file, settings = model / part / f"{NETWORKS[part]}.safetensors", model / part / "config.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:2000])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif damage == "config list":
        settings.write_text("[]")
    elif damage == "config odd":
        odd = {
            name: "x" if isinstance(value, int) else value
            for name, value in json.loads(settings.read_text()).items()
        }
        settings.write_text(json.dumps(odd))
    elif damage == "no config":
        settings.unlink()
    elif damage == "no tokenizer":
        shutil.rmtree(model / "tokenizer")
    elif damage == "pickle":
        file.unlink()
        file.with_name("pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'exit'\ntR.")
    else:
        weights = load_file(file)
        weights[sorted(weights)[3]] = torch.zeros(3, 3)
        save_file(weights, file, {"format": "pt"})
    for load in (lambda: load_family(ModelConfig(base=str(model))), lambda: load_pipeline(str(model))):
        with pytest.raises(UserError) as caught:
            load()
        assert caught.value.why
    if damage == "pointer":
        assert "git lfs pull" in caught.value.fix


@pytest.mark.parametrize("text", ["[]", "3", '{"_class_name": ["a"]}', "{}", "[" * 100_000])
def test_an_index_that_names_no_pipeline_is_one_clear_error(world, tmp_path, text):
    model = Path(shutil.copytree(world / "base", tmp_path / "model"))
    (model / "model_index.json").write_text(text)
    for load in (lambda: load_family(ModelConfig(base=str(model))), lambda: load_pipeline(str(model))):
        with pytest.raises(UserError, match=r"model_index\.json cannot be read"):
            load()


def kohya(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in load_file(run / "model/pytorch_lora_weights.safetensors").items():
        module, part = name.removeprefix("unet.").rsplit(".lora.", 1)
        found[f"lora_unet_{module.replace('.', '_')}.lora_{part}"] = tensor
        found[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(8.0)
    return found


def test_a_lora_of_which_half_the_modules_fit_says_so(world, tmp_path, caplog):
    train(world, tmp_path / "run", str(world / "base"), adapter__rank=4, adapter__alpha=8.0)
    whole = kohya(tmp_path / "run")
    names = sorted({name.split(".")[0] for name in whole})
    foreign = set(names[::2])
    half = {
        n.replace("_blocks_", "_blocks_9") if n.split(".")[0] in foreign else n: t for n, t in whole.items()
    }
    none = {n.replace("_blocks_", "_blocks_9"): t for n, t in whole.items() if "mid_block" not in n}
    for name, weights in (("whole", whole), ("half", half), ("none", none)):
        save_file(weights, tmp_path / f"{name}.safetensors")
    draw(world, tmp_path / "trained", "--model", tmp_path / "run")
    said = draw(
        world, tmp_path / "kohya", "--model", world / "base", "--lora", tmp_path / "whole.safetensors"
    )
    assert "modules of the LoRA" not in said
    assert pixels(tmp_path / "kohya") == pixels(tmp_path / "trained")
    with caplog.at_level(logging.WARNING):
        load_pipeline(str(world / "base"), lora=str(tmp_path / "half.safetensors"))
    misfits = sum(f.replace("_blocks_", "") != f for f in foreign)
    fitting = len(names) - misfits
    share = f"{100 * fitting / len(names):.0f} %"
    assert f"{fitting} of {len(names)} modules of the LoRA" in caplog.text
    assert share in caplog.text
    with pytest.raises(UserError, match="does not fit the model"):
        load_pipeline(str(world / "base"), lora=str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("place", ["run", "run/model"])
def test_a_lora_on_a_lora_is_refused_and_not_drawn_without_the_first(world, tmp_path, place):
    train(world, tmp_path / "run", str(world / "base"))
    second = Path(shutil.copytree(tmp_path / "run/model", tmp_path / "second"))
    about = json.loads((second / "diffpref.json").read_text())
    (second / "diffpref.json").write_text(json.dumps(about | {"base": str(tmp_path / place)}))
    assert "is a LoRA itself" in draw(world, tmp_path / "out", "--model", second, expect=2)


def test_a_model_whose_safety_checker_was_never_fetched_is_drawn(world, tmp_path):
    """Drawing leaves the checker out, so it need not be there."""
    repo = world / "hub" / "models--acme--checked"
    folder = Path(shutil.copytree(world / "base", repo / "snapshots" / ("c" * 40)))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c" * 40)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    draw(world, tmp_path / "hub", "--model", "acme/checked")
    draw(world, tmp_path / "folder", "--model", folder)
    assert pixels(tmp_path / "hub") == pixels(tmp_path / "folder")
