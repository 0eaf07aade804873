from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from diffpref import generation
from diffpref.errors import UserError
from diffpref.families.miniature import build_stable_diffusion
from diffpref.generation import generate, read_manifest, read_rows
from diffpref.pipelines import LoadedPipeline, build_scheduler, load_pipeline
from tests import forked
from tests.miniatures import save_lora

SUITE = str(Path(__file__).parents[1] / "data" / "suite.toml")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    build_stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(str(model), SUITE, tmp_path_factory.mktemp("drawn") / "base", batch=5)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def plain_diffusers(pipeline: StableDiffusionPipeline, prompt: str, seed: int) -> np.ndarray:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    image = pipeline(
        prompt,
        num_inference_steps=2,
        guidance_scale=3.0,
        width=64,
        height=64,
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images[0]
    return np.asarray(image).astype(int)


def test_an_image_is_the_one_plain_diffusers_draws_for_the_seed_in_its_row(
    model: Path, tmp_path: Path
) -> None:
    out = generate(str(model), SUITE, tmp_path / "out", limit=2, batch=1)
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    rows = read_rows(out)
    assert len(rows) == 4
    for row in rows:
        assert (pixels(out / row["file"]) == plain_diffusers(pipeline, row["prompt"], row["seed"])).all()


def test_the_batch_changes_no_image_by_more_than_rounding(drawn: Path, model: Path, tmp_path: Path) -> None:
    single = generate(str(model), SUITE, tmp_path / "out", limit=3, batch=1)
    for row in read_rows(single):
        assert np.abs(pixels(single / row["file"]) - pixels(drawn / row["file"])).max() <= 1


def test_the_folder_says_how_its_images_were_made(drawn: Path, model: Path) -> None:
    rows, manifest = read_rows(drawn), read_manifest(drawn)
    assert [row["id"] for row in rows][:3] == ["00000-s0", "00000-s1", "00001-s0"]
    assert len(rows) == 14
    assert rows[2] == {
        "id": "00001-s0",
        "file": "images/00001-s0.png",
        "prompt_id": 1,
        "prompt": "a red circle left of a blue square",
        "kind": "position",
        "sample": 0,
        "seed": 1,
    }
    assert manifest["model"] == str(model)
    assert manifest["suite"] == {
        "name": "hand-written", "scheduler": "ddim", "steps": 2, "guidance": 3.0, "width": 64, "height": 64,
        "negative_prompt": "", "seeds": [0, 1],
    }  # fmt: skip
    assert manifest["dtype"] == "fp32"
    assert manifest["truncated_prompts"] == 0
    assert manifest["versions"]["torch"] == torch.__version__


def test_a_stopped_run_goes_on_and_ends_as_if_never_stopped(
    drawn: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    sample = generation._sample
    calls = []

    def stop_at_third_batch(*arguments: object) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "_sample", stop_at_third_batch)
    with pytest.raises(KeyboardInterrupt):
        generate(str(model), SUITE, out, batch=5)
    assert len(read_rows(out)) == 10
    lines = (out / "manifest.jsonl").read_bytes()
    (out / "manifest.jsonl").write_bytes(lines + b'{"id": "00005-s0", "fi')  # torn by a kill
    (out / "images" / "00000-s1.png").unlink()  # lost: must be drawn again

    generate(str(model), SUITE, out, batch=5)
    assert len(calls) == 3 + 1  # five images were missing
    assert (out / "manifest.jsonl").read_text() == (drawn / "manifest.jsonl").read_text()
    for row in read_rows(drawn):
        assert np.abs(pixels(out / row["file"]) - pixels(drawn / row["file"])).max() <= 1


def test_more_prompts_are_added_to_a_limited_folder(model: Path, drawn: Path, tmp_path: Path) -> None:
    out = generate(str(model), SUITE, tmp_path / "out", limit=1)
    first = (out / "images" / "00001-s0.png").stat().st_mtime_ns
    generate(str(model), SUITE, out)
    assert (out / "images" / "00001-s0.png").stat().st_mtime_ns == first
    assert (out / "manifest.jsonl").read_text() == (drawn / "manifest.jsonl").read_text()


def test_a_folder_of_other_settings_is_refused_and_left_as_it_was(model: Path, tmp_path: Path) -> None:
    out = generate(str(model), SUITE, tmp_path / "out", limit=1)
    before = {path.name: path.read_bytes() for path in out.glob("manifest*")}
    other = tmp_path / "other.toml"
    other.write_text(Path(SUITE).read_text().replace("steps = 2", "steps = 3"))
    with pytest.raises(UserError, match=r"suite.steps: 2 -> 3"):
        generate(str(model), str(other), out)
    build_stable_diffusion(seed=9).save_pretrained(tmp_path / "model9")
    with pytest.raises(UserError, match="model_fingerprint"):
        generate(str(tmp_path / "model9"), SUITE, out)
    assert before == {path.name: path.read_bytes() for path in out.glob("manifest*")}


def test_a_lora_folder_knows_its_base_and_equals_plain_load_lora_weights(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    save_lora(run / "model", base=str(model))
    (run / "metrics.jsonl").write_text("")
    out = generate(str(run), SUITE, tmp_path / "out", limit=1, batch=1)
    assert read_manifest(out)["run"] == str(run)
    explicit = load_pipeline(str(model), lora=str(run / "model"))
    assert explicit.fingerprint == read_manifest(out)["model_fingerprint"]
    assert explicit.fingerprint != load_pipeline(str(model)).fingerprint
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.load_lora_weights(str(run / "model"))
    row = read_rows(out)[0]
    assert (pixels(out / row["file"]) == plain_diffusers(pipeline, row["prompt"], row["seed"])).all()
    base = StableDiffusionPipeline.from_pretrained(model)
    assert (pixels(out / row["file"]) != plain_diffusers(base, row["prompt"], row["seed"])).any()


def test_mistakes_in_the_model_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model not found"):
        load_pipeline(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"neither model_index.json nor"):
        load_pipeline(str(tmp_path))
    lora = tmp_path / "lora"
    save_lora(lora, base=None)
    with pytest.raises(UserError, match="does not say what it belongs to"):
        load_pipeline(str(lora))
    with pytest.raises(UserError, match="holds no LoRA"):
        load_pipeline(str(model), lora=str(model))
    with pytest.raises(UserError, match="did you mean 'fp16'"):
        load_pipeline(str(model), dtype="fp61")
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the unet"):
        load_pipeline(str(broken))


def test_a_model_that_draws_nan_is_an_error_and_not_a_black_image(model: Path, tmp_path: Path) -> None:
    pipeline = build_stable_diffusion()
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="not numbers"):
        generate(str(tmp_path / "nan"), SUITE, tmp_path / "out", limit=1)
    assert read_rows(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver++", "pndm"])
def test_every_scheduler_keeps_the_models_noise_schedule(name: str, model: Path, tmp_path: Path) -> None:
    config = build_stable_diffusion().scheduler.config
    scheduler = build_scheduler(name, config)
    expected = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert torch.allclose(scheduler.betas, expected)
    suite = tmp_path / "suite.toml"
    suite.write_text(Path(SUITE).read_text().replace('"ddim"', f'"{name}"').replace("steps = 2", "steps = 4"))
    out = generate(str(model), str(suite), tmp_path / "out", limit=1)
    assert len(read_rows(out)) == 2
    assert json.loads((out / "manifest.json").read_text())["suite"]["scheduler"] == name


def test_prompts_longer_than_the_text_encoder_reads_are_counted(model: Path) -> None:
    loaded: LoadedPipeline = load_pipeline(str(model))
    # the miniature's tokenizer spells letter by letter: 75 letters and two markers just fit
    assert loaded.count_truncated(["a" * 75]) == 0
    assert loaded.count_truncated(["a" * 76, "a", "b" * 200]) == 2


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work_and_draw_what_one_draws(
    model: Path, drawn: Path, tmp_path: Path, processes: int
) -> None:
    """Seven prompts with two seeds in batches of five: three batches."""
    words = ["generate", "--model", model, "--suite", SUITE, "--batch", 5, "--out", tmp_path / "out"]
    for one in forked.launch(processes, tmp_path / "log", *words):
        one.finish()
    out = tmp_path / "out"
    assert (out / "manifest.jsonl").read_bytes() == (drawn / "manifest.jsonl").read_bytes()
    for row in read_rows(drawn):
        assert (out / row["file"]).read_bytes() == (drawn / row["file"]).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["images", "manifest.json", "manifest.jsonl"]


def test_what_another_process_drew_before_a_kill_counts(model: Path, drawn: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(drawn, tmp_path / "out"))
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text("".join(lines[:5]))
    (out / ".1.manifest.jsonl").write_text("".join(lines[5:10]) + lines[10][:20])
    kept = (out / "images" / "00004-s1.png").stat().st_mtime_ns
    generate(str(model), SUITE, out, batch=5)
    assert (out / "manifest.jsonl").read_text() == "".join(lines)
    assert (out / "images" / "00004-s1.png").stat().st_mtime_ns == kept
    assert not (out / ".1.manifest.jsonl").exists()
