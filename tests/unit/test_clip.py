"""One network for all who name the same weights, each image and text through it once, safe checkpoints."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from diffpref.errors import UserError
from diffpref.evaluators import EVALUATORS, Runtime
from diffpref.evaluators.checkpoints import find_file, load_state, read_state
from diffpref.evaluators.clip import Clip
from diffpref.evaluators.loading import load_clip
from diffpref.evaluators.pixels import Pixels
from tests.clips import LONG, picture, write_aesthetic, write_hf_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of everything that went through a network."""
    seen: list[tuple[int, ...]] = []
    forward = Clip._forward

    def counted(self: Clip, encode: Any, rows: torch.Tensor, cast: bool) -> Any:
        seen.append(tuple(rows.shape))
        return forward(self, encode, rows, cast)

    monkeypatch.setattr(Clip, "_forward", counted)
    return seen


def test_vectors_are_units_of_the_networks_width(folder: Path) -> None:
    clip = load_clip(str(folder))
    for vectors in (clip.embed_images([picture(64, 64), picture(9, 70)]), clip.embed_texts(["a", LONG])):
        assert (vectors.shape, vectors.dtype) == ((2, 24), np.float32)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert clip.embed_images([]).shape == clip.embed_texts([]).shape == (0, 24)


def test_repeated_images_and_prompts_cost_one_pass(folder: Path, passes: list[tuple[int, ...]]) -> None:
    clip = load_clip(str(folder), Runtime(batch=4))
    image, other = picture(64, 64, 1), picture(64, 64, 2)
    first = clip.embed_images([image, other, image, image, other])
    assert passes == [(4, 3, 64, 64)]
    assert np.array_equal(first[[0, 1]], first[[2, 4]])
    again = clip.embed_images([other, image.copy()])
    assert np.array_equal(again, first[[1, 0]])
    assert len(passes) == 1
    words = clip.embed_texts(["a dog", "a cat", "a dog", LONG])
    assert passes[1:] == [(4, 16), (4, 77)]
    assert np.array_equal(clip.embed_texts(["a  DOG"])[0], words[0])  # the same tokens
    assert len(passes) == 3


def test_evaluators_with_the_same_weights_share_network_and_vectors(
    folder: Path, passes: list[tuple[int, ...]]
) -> None:
    names = ("clipscore", "clipscore-torchmetrics", "pickscore", "clipscore-jmhessel")
    runtime = Runtime(str(folder))
    raw, metric, pick, hessel = (EVALUATORS[name](runtime) for name in names)
    image = picture(96, 96)  # square: nothing to crop, so all crops agree
    cosine = raw.score([image], ["a dog"])
    assert len(passes) == 2
    assert np.allclose(metric.score([image], ["a dog"]), 100 * cosine)
    assert np.allclose(pick.score([image], ["a dog"]), 87.5 * cosine)
    assert len(passes) == 2
    hessel.score([image], ["a dog"])  # its prefix makes another text of it
    assert len(passes) == 3
    hessel.score([picture(64, 67)], ["a dog"])  # margins of one and two pixels: another crop
    raw.score([picture(64, 67)], ["a dog"])
    assert len(passes) == 5


def test_weights_that_changed_on_disk_are_loaded_again(tmp_path: Path) -> None:
    path = write_hf_clip(tmp_path / "clip")
    first = load_clip(str(path))
    assert load_clip(str(path)).network is first.network
    state = load_file(path / "model.safetensors")
    twice = {name: 2 * value for name, value in state.items()}
    save_file(twice, path / "model.safetensors", {"format": "pt"})
    assert load_clip(str(path)).network.weights != first.network.weights


def test_the_oldest_vectors_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffpref.evaluators.clip.REMEMBERED", 3)
    clip = load_clip(str(folder), Runtime(batch=2))
    images = [picture(64, 64, seed) for seed in range(6)]
    first = clip.embed_images(images)
    assert len(clip.network.known) == 3
    assert np.array_equal(clip.embed_images(images), first)


def test_a_line_of_pixels_needs_no_more_memory_than_any_image() -> None:
    """Resized as a whole it would have 3 billion pixels."""
    for fit in ("crop, floor", "crop, round", "squash", "pad"):
        pixels = Pixels(224, fit)(picture(1, 60_000))
        assert pixels.shape == (3, 224, 224)
        assert torch.isfinite(pixels).all()


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(UserError, match="is no CLIP model"):
        load_clip(str(tmp_path))


def test_missing_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    """transformers itself would fill them with random numbers and go on."""
    path = write_hf_clip(tmp_path / "clip")
    state = load_file(path / "model.safetensors")
    del state["visual_projection.weight"]
    state["text_projection.weight"] = state["text_projection.weight"][:, :7].contiguous()
    state["extra.weight"] = torch.zeros(1)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as error:
        load_clip(str(path))
    message = str(error.value)
    assert "missing visual_projection.weight" in message
    assert "unexpected extra.weight" in message
    assert "text_projection.weight: [24, 7], expected [24, 32]" in message


def test_a_damaged_file_is_the_users_mistake(tmp_path: Path) -> None:
    path = write_hf_clip(tmp_path / "clip")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot load the CLIP model"):
        load_clip(str(path))


def test_weights_without_a_tokenizer_say_where_to_get_one(tmp_path: Path) -> None:
    path = write_hf_clip(tmp_path / "clip")
    for file in path.glob("*token*"):
        file.unlink()
    for file in (path / "vocab.json", path / "merges.txt"):
        file.unlink(missing_ok=True)
    with pytest.raises(UserError, match="no tokenizer") as error:
        load_clip(str(path))
    assert "openai/clip-vit-large-patch14" in str(error.value)


def test_a_preprocessor_with_other_statistics_is_respected(tmp_path: Path) -> None:
    path = write_hf_clip(tmp_path / "clip")
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load_clip(str(path)).pixels.mean == (0.5, 0.5, 0.5)
    (path / "preprocessor_config.json").write_text(json.dumps({"do_center_crop": False}))
    with pytest.raises(UserError, match="not supported"):
        load_clip(str(path))


def test_a_pickle_is_converted_once_and_never_run(tmp_path: Path, cache: Path) -> None:
    folder = write_aesthetic(tmp_path / "a")
    (path,) = folder.glob("*.pth")
    state = read_state(path)
    (kept,) = (cache / "weights").iterdir()
    assert kept.suffix == ".safetensors"
    assert load_file(kept).keys() == state.keys()
    before = kept.stat().st_mtime_ns
    assert torch.equal(read_state(path)["layers.0.weight"], state["layers.0.weight"])
    assert kept.stat().st_mtime_ns == before

    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {"a": Program()}}, path)
    with pytest.raises(UserError, match="never run"):
        read_state(path)
    assert not (tmp_path / "ran").exists()


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFPREF_CACHE", str(tmp_path / "file"))
    (path,) = write_aesthetic(tmp_path / "a").glob("*.pth")
    assert len(read_state(path)) == 10
    assert "not kept" in caplog.text


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ({"module.a": torch.ones(2), "module.b": torch.ones(3)}, None),
        ({"epoch": 3, "state_dict": {"a": torch.ones(2), "b": torch.ones(3)}}, None),
        ({"state_dict": {}}, "holds no weights"),
        ([torch.ones(2)], "holds no weights"),
    ],
)
def test_what_training_scripts_write_is_unwrapped(tmp_path: Path, content: Any, hint: str | None) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    if hint:
        with pytest.raises(UserError, match=hint):
            read_state(path)
    else:
        assert {name: value.shape for name, value in read_state(path).items()} == {"a": (2,), "b": (3,)}


def test_other_formats_and_torn_files_are_refused(tmp_path: Path) -> None:
    for name, hint in (("weights.ckpt", "cannot be read"), ("weights.zip", r"ends in '\.zip'")):
        (tmp_path / name).write_bytes(b"PK\x03\x04 torn")
        with pytest.raises(UserError, match=hint):
            read_state(tmp_path / name)


def test_the_first_differing_names_are_shown_and_the_rest_counted() -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
    with pytest.raises(UserError) as error:
        load_state(module, {"0.weight": torch.zeros(2, 2)}, "x.pt", "four layers")
    assert "x.pt does not hold four layers" in str(error.value)
    assert "missing 0.bias, 1.bias, 1.weight and 4 more" in str(error.value)


def test_whole_numbers_are_no_weights() -> None:
    quantised = {"weight": torch.zeros(2, 2, dtype=torch.int8), "bias": torch.zeros(2)}
    with pytest.raises(UserError, match="weight is of int8"):
        load_state(torch.nn.Linear(2, 2), quantised, "x.pt", "a layer")


def test_a_folder_without_the_file_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(UserError) as error:
        find_file(str(tmp_path), ["a.pt", "a.safetensors"], "x/y", "weights of a")
    assert "it holds other.txt" in str(error.value)
    assert "a.pt or a.safetensors" in str(error.value)


def test_text_positions_that_follow_the_end_change_nothing(folder: Path) -> None:
    """Short texts go through in short passes: the same vectors as at full length."""
    clip, model = load_clip(str(folder)), CLIPModel.from_pretrained(folder).eval()
    texts = [
        "",
        "a dog",
        "a dog and a cat and a bird and a fish on a boat in the sea at night",
    ]
    full = torch.full((3, 77), 49_407)
    for row, text in zip(full, texts, strict=True):
        ids = clip.text(text).ids
        row[: len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        expected = model.get_text_features(input_ids=full).pooler_output
    expected = expected / expected.norm(dim=-1, keepdim=True)
    assert np.abs(clip.embed_texts(texts) - expected.numpy()).max() < 1e-6


def test_the_passes_of_a_call_are_fetched_together(folder: Path, fetched: list[torch.Size]) -> None:
    """A GPU then works on while the next pass is prepared."""
    clip = load_clip(str(folder), Runtime(batch=2))
    fetched.clear()  # the weights were hashed
    clip.embed_images([picture(64, 64, seed) for seed in range(7)])
    clip.embed_texts([f"{number} cats" for number in range(9)] + [LONG])
    assert [shape[0] for shape in fetched] == [7, 10]


def test_on_a_gpu_a_pass_takes_as_many_texts_as_the_runtime_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = replace(load_clip(str(folder)).network, device=torch.device("meta"), known=OrderedDict())
    seen: list[int] = []

    def forward(self: Clip, encode: Any, rows: torch.Tensor, cast: bool) -> torch.Tensor:
        seen.append(len(rows))
        return torch.eye(len(rows), network.width) + len(seen)

    monkeypatch.setattr(Clip, "_forward", forward)
    texts = [f"{number} cats" for number in range(20)]
    vectors = Clip(network, network.pixels, network.text, batch=16).embed_texts(texts)
    assert seen == [16, 16]
    assert np.array_equal(vectors[:, 23], [1.0] * 16 + [2.0] * 4)  # in the order of the texts
    assert np.array_equal(vectors[17], np.eye(24, dtype=np.float32)[1] + 2)
    again = Clip(network, network.pixels, network.text, batch=8).embed_texts(texts[:3])
    assert seen == [16, 16, 8]  # embeddings of another pass differ by rounding
    assert np.array_equal(again[0], np.eye(24, dtype=np.float32)[0] + 3)
