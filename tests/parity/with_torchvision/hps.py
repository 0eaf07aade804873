"""HPS and CLIPScore on open_clip networks, against open_clip called directly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from diffpref.errors import UserError
from diffpref.evaluators import EVALUATORS, Runtime
from diffpref.evaluators.loading import load_clip
from tests.clips import SIDE, TEXTS, picture, pictures, write_open_clip
from tests.parity.golden.hps import CASES, FILE, named_weights

FILES = ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")
BICUBIC = InterpolationMode.BICUBIC
PAIRS = [(image, text) for image in pictures() for text in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_open_clip(tmp_path_factory.mktemp("hps"), FILES)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFPREF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def model_of(folder: Path, file: str):
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    model.load_state_dict(torch.load(folder / file, weights_only=True)["state_dict"])
    return model.eval()


def longest_side(antialias: bool):
    def transform(image):
        values = functional.to_tensor(image)
        scale = SIDE / max(values.shape[1:])
        height, width = (round(edge * scale) for edge in values.shape[1:])
        values = functional.resize(values, (height, width), BICUBIC, antialias=antialias)
        left, top = (SIDE - width) // 2, (SIDE - height) // 2
        values = functional.pad(values, [left, top, SIDE - width - left, SIDE - height - top], fill=0)
        return functional.normalize(values, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)

    return transform


def cosines(model, transform) -> np.ndarray:
    """One pair at a time, as the package does."""
    found = []
    for image, text in PAIRS:
        with torch.no_grad():
            pictures, words, _ = model(transform(image)[None], open_clip.tokenize([text]))
            found.append(torch.diagonal(pictures @ words.T)[0].item())
    return np.array(found)


@pytest.mark.parametrize("version", ["v2", "v2.1"])
@pytest.mark.parametrize("antialias", [True, False])
def test_hps_equals_open_clip(folder, version, antialias):
    name = f"hps-{version}" + ("" if antialias else "-aliased")
    expected = cosines(model_of(folder, f"HPS_{version}_compressed.pt"), longest_side(antialias))
    evaluator = EVALUATORS[name](Runtime(str(folder), batch=5))
    scores = evaluator.score(*zip(*PAIRS, strict=True))
    assert evaluator.name == name
    assert np.abs(scores - expected).max() < 1e-5
    assert len(np.unique(expected.round(4))) > 40


def test_hps_equals_the_published_package(tmp_path):
    """Numbers of hpsv2x's own ``score``, made by tests/parity/golden/hps.py."""
    folder = write_open_clip(tmp_path / "golden", ())
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    weights = named_weights({name: tuple(value.shape) for name, value in model.state_dict().items()})
    torch.save({"state_dict": weights}, folder / "HPS_v2_compressed.pt")
    images = [picture(*size) for size, _ in CASES]
    scores = EVALUATORS["hps-v2"](Runtime(str(folder))).score(images, [prompt for _, prompt in CASES])
    (expected,) = json.loads(FILE.read_text()).values()
    assert np.abs(scores - expected).max() < 1e-5


def test_versions_and_antialiasing_are_told_apart(folder):
    names = ["hps-v2", "hps-v2-aliased", "hps-v2.1", "hps-v2.1-aliased"]
    found = [EVALUATORS[name](Runtime(str(folder))) for name in names]
    assert len({e.fingerprint for e in found}) == len({e.version for e in found}) == 4
    scores = [e.score(*zip(*PAIRS[:20], strict=True)) for e in found]
    assert min(np.abs(a - b).max() for a in scores for b in scores if a is not b) > 1e-3


def test_a_file_and_its_safetensors_copy_are_the_same(folder, tmp_path):
    copy = write_open_clip(tmp_path / "copy", ())
    state = torch.load(folder / FILES[1], weights_only=True)["state_dict"]
    save_file(state, copy / "HPS_v2.1_compressed.safetensors")
    first = EVALUATORS["hps-v2.1"](Runtime(str(folder / FILES[1])))
    second = EVALUATORS["hps-v2.1"](Runtime(str(copy)))
    assert first.fingerprint == second.fingerprint


def test_long_prompts_are_cut_and_counted(folder):
    evaluator = EVALUATORS["hps-v2"](Runtime(str(folder)))
    scores, details = evaluator.explain([PAIRS[0][0]] * len(TEXTS), TEXTS)
    expected = [max(0, len(open_clip.tokenizer._tokenizer.encode(text)) + 2 - 77) for text in TEXTS]
    assert details["cut"].tolist() == expected
    assert sum(map(bool, expected)) == 1
    assert np.isfinite(scores).all()


def test_the_wrong_checkpoint_names_what_differs(tmp_path):
    folder = write_open_clip(tmp_path / "w", FILES[:1])
    path = folder / FILES[0]
    state = torch.load(path, weights_only=True)["state_dict"]
    state["visual.proj"] = state["visual.proj"][:, :5]
    del state["ln_final.weight"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError) as error:
        EVALUATORS["hps-v2"](Runtime(str(folder)))
    assert "missing ln_final.weight" in str(error.value)
    assert "visual.proj: [32, 5], expected [32, 24]" in str(error.value)


def test_a_file_of_published_size_does_not_fit_another_network(tmp_path):
    torch.save({"state_dict": {"logit_scale": torch.ones(())}}, tmp_path / "RN50.pt")
    with pytest.raises(UserError, match="does not hold the weights of open_clip's RN50"):
        load_clip(f"open_clip:RN50/{tmp_path / 'RN50.pt'}")


def test_clipscore_reads_a_folder_of_open_clip(folder, tmp_path):
    reference = write_open_clip(tmp_path / "clip", ("open_clip_pytorch_model.bin",), seed=3)
    model = model_of(reference, "open_clip_pytorch_model.bin")
    crop = transforms.Compose([
        transforms.Resize(SIDE, BICUBIC), transforms.CenterCrop(SIDE), transforms.ToTensor(),
        transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
    ])  # fmt: skip
    for weights in (str(reference), f"open_clip:{reference}"):
        evaluator = EVALUATORS["clipscore"](Runtime(weights))
        scores = evaluator.score(*zip(*PAIRS, strict=True))
        assert np.abs(scores - cosines(model, crop)).max() < 1e-5
    with pytest.raises(UserError, match="needs a CLIP in transformers' format"):
        EVALUATORS["clipscore-jmhessel"](Runtime(str(reference)))


@pytest.mark.parametrize(
    ("weights", "hint"),
    [
        ("open_clip:ViT-H14/laion2b_s32b_b79k", "did you mean 'ViT-H-14'"),
        ("open_clip:ViT-H-14/laion2b_s32b_b79", "did you mean 'laion2b_s32b_b79k'"),
        ("open_clip:ViT-B-32/no/such/file.pt", "neither one of its tags nor a file"),
    ],
)
def test_names_that_do_not_exist(weights, hint):
    with pytest.raises(UserError) as error:
        load_clip(weights)
    assert hint in str(error.value)


def test_lower_precision_is_another_version_and_close(folder):
    exact = EVALUATORS["hps-v2.1"](Runtime(str(folder)))
    rough = EVALUATORS["hps-v2.1"](Runtime(str(folder), dtype="bf16"))
    assert rough.version == f"{exact.version}, bf16"
    assert rough.fingerprint != exact.fingerprint
    pairs = list(zip(*PAIRS[:12], strict=True))
    assert 0 < np.abs(rough.score(*pairs) - exact.score(*pairs)).max() < 0.05
