"""ImageReward against golden numbers of the published package, made by golden/make_image_reward.py."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpref.errors import UserError
from diffpref.evaluators import DetailedEvaluator, Runtime, load_evaluators
from diffpref.evaluators.checkpoints import cache_folder
from diffpref.evaluators.image_reward import CACHED_IMAGES, ImageReward, build, load
from tests.image_reward_models import GOLDEN, shapes, write_image_reward
from tests.parity import image_reward_cases as small

CASES = small.cases()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_reward(tmp_path_factory.mktemp("image-reward"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPREF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def evaluator(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageReward:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFPREF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return load(Runtime(weights=str(folder), batch=4))


def test_scores_equal_the_published_package(evaluator: ImageReward) -> None:
    images, prompts = zip(*CASES.values(), strict=True)
    scores = evaluator.score(images, prompts)
    expected = [GOLDEN["cases"][name]["score"] for name in CASES]
    assert scores.dtype == np.float32
    assert np.std(expected) > 0.2  # the cases do differ
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("prompt")])
def test_pixels_equal_torchvisions(evaluator: ImageReward, name: str) -> None:
    rule = evaluator.pixels
    mean, std = (torch.tensor(values)[:, None, None] for values in (rule.mean, rule.std))
    bytes_ = ((rule(CASES[name][0]) * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    assert hashlib.sha256(bytes_.numpy().tobytes()).hexdigest() == GOLDEN["cases"][name]["pixels"]


def test_tokens_equal_the_old_tokenizers(evaluator: ImageReward) -> None:
    tokens, attended = evaluator.tokens([prompt for _, prompt in CASES.values()])
    assert tokens.tolist() == [GOLDEN["cases"][name]["tokens"] for name in CASES]
    assert attended.equal((tokens != 0).long())


def test_the_published_checkpoint_fits_by_name_and_shape() -> None:
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes("full_size").items()}
    network = build(published, {"num_attention_heads": 12}, "ImageReward.pt")
    assert (
        sum(p.numel() for p in network.vision.parameters()) == 303_301_632
    )  # ViT-L/16 at 224 without a head
    assert network.vision.config.num_attention_heads == 16
    assert (network.text.config.num_hidden_layers, network.text.config.vocab_size) == (12, 30_524)
    del published["blip.text_encoder.encoder.layer.7.crossattention.self.key.bias"]
    with pytest.raises(UserError, match=r"missing text\.encoder\.layer\.7\.crossattention\.self\.key\.bias"):
        build(published, {}, "ImageReward.pt")


@pytest.fixture(scope="module")
def alone(evaluator: ImageReward) -> np.ndarray:
    """Scores of all cases, each in a call of its own."""
    return np.concatenate([evaluator.score([image], [prompt]) for image, prompt in CASES.values()])


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(len(CASES))), st.integers(1, len(CASES)))
def test_a_score_does_not_depend_on_order_or_batch_mates(
    evaluator: ImageReward, alone: np.ndarray, order: list[int], count: int
) -> None:
    cases = list(CASES.values())
    images, prompts = zip(*(cases[i] for i in order[:count]), strict=True)
    assert np.array_equal(evaluator.score(images, prompts), alone[order[:count]])


def test_a_score_does_not_depend_on_the_batch_size(evaluator: ImageReward, folder: Path) -> None:
    images, prompts = zip(*list(CASES.values())[-5:], strict=True)
    one_by_one = load(Runtime(weights=str(folder), batch=1))
    np.testing.assert_allclose(one_by_one.score(images, prompts), evaluator.score(images, prompts), atol=2e-6)


def test_several_prompts_for_one_image_cost_one_vision_pass(folder: Path) -> None:
    evaluator = load(Runtime(weights=str(folder), batch=2))
    rows = []
    evaluator.network.vision.register_forward_hook(lambda *call: rows.append(len(call[2].last_hidden_state)))
    image, other = small.picture((90, 60)), small.picture((60, 90))
    prompts = list(small.PROMPTS.values())
    first = evaluator.score([image.copy() for _ in prompts], prompts)
    assert rows == [1]
    again = evaluator.score([other, image], ["a cat", prompts[0]])
    assert rows == [1, 1]
    assert again[1] == first[0]


def test_a_pair_that_comes_again_costs_no_text_pass(evaluator: ImageReward) -> None:
    images, prompts = zip(*list(CASES.values())[:4], strict=True)
    apart = evaluator.score(images, prompts)
    passes: list[int] = []
    hook = evaluator.network.text.register_forward_hook(lambda *_: passes.append(1))
    order = [3, 0, 1, 0, 2, 3, 1, 1, 0]
    again = evaluator.score([images[i].copy() for i in order], [prompts[i] for i in order])
    hook.remove()
    assert np.array_equal(again, apart[order])
    assert len(passes) == 1


def test_kept_features_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffpref.evaluators.image_reward.CACHED_IMAGES", 2)
    evaluator = load(Runtime(weights=str(folder), batch=1))
    passes = []
    evaluator.network.vision.register_forward_hook(lambda *_: passes.append(1))
    first, second, third = (small.picture((60 + n, 60)) for n in range(3))
    for image, total in ((first, 1), (second, 2), (first, 2), (third, 3), (first, 3), (second, 4)):
        evaluator.score([image], ["a cat"])
        assert len(passes) == total
    assert CACHED_IMAGES >= 32


def test_no_images_give_no_scores(evaluator: ImageReward) -> None:
    assert evaluator.score([], []).shape == (0,)


def test_tokens_beyond_the_limit_are_counted(evaluator: ImageReward) -> None:
    prompts = [" ".join(["cat"] * count) for count in (0, 33, 34, 50)]  # [CLS] and [SEP] come to them
    scores, details = evaluator.explain([small.picture((64, 64))] * 4, prompts)
    assert np.asarray(details["cut"]).tolist() == [0, 0, 1, 17]
    assert scores[1] == scores[2] == scores[3] != scores[0]


def test_it_is_listed_and_says_what_it_is(folder: Path) -> None:
    full, half = (
        load_evaluators(["image-reward"], {"image-reward": Runtime(weights=str(folder), dtype=dtype)})[0]
        for dtype in ("fp32", "bf16")
    )
    assert isinstance(full, DetailedEvaluator)
    assert list(full.columns()) == ["image-reward", "image-reward.cut"]
    assert (full.version, half.version) == ("1", "1, bf16")
    assert full.fingerprint != half.fingerprint
    image = small.picture((64, 64))
    difference = abs(full.score([image], ["a cat"]) - half.score([image], ["a cat"]))
    assert 0 < difference < 0.1


def test_the_pickle_is_read_once_and_never_changed(tmp_path: Path) -> None:
    folder = write_image_reward(tmp_path)
    pickled = folder / "ImageReward.pt"
    before = pickled.read_bytes()
    first = load(Runtime(weights=str(pickled)))  # the file itself: what stands beside it is found
    copy = cache_folder() / "weights" / f"{hashlib.sha256(before).hexdigest()}.safetensors"
    assert copy.is_file()
    assert pickled.read_bytes() == before
    copied = tmp_path / "other"
    copied.mkdir()
    copy.rename(copied / "ImageReward.safetensors")
    (folder / "vocab.txt").rename(copied / "vocab.txt")
    second = load(Runtime(weights=str(copied)))  # sizes follow from the weights: no med_config.json there
    image = small.picture((64, 64))
    assert first.score([image], ["a cat"]) == second.score([image], ["a cat"])


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (("a.pt", None), ("b.pt", pickle.dumps(Evil()))):
        path = tmp_path / name
        if data is None:
            torch.save({"mlp.layers.0.weight": Evil()}, path)
        else:
            path.write_bytes(data)
        with pytest.raises(UserError, match="never run") as caught:
            load(Runtime(weights=str(path)))
        assert "Unsupported" in caught.value.why
        assert "weights_only" not in caught.value.why
    assert not (tmp_path / "ran").exists()


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    folder = write_image_reward(tmp_path)
    path = folder / "ImageReward.pt"
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)

    def message(weights: Path | str = folder) -> str:
        with pytest.raises(UserError) as raised:
            load(Runtime(weights=str(weights)))
        return str(raised.value)

    torch.save({"visual.proj": torch.zeros(2), "logit_scale": torch.zeros(())}, path)
    assert "patch_embedding" in (found := message())
    assert "visual.proj" in found
    torch.save(state | {"mlp.layers.2.bias": torch.zeros(7), "extra": torch.zeros(1)}, path)
    assert "unexpected extra" in (found := message())
    assert "mlp.2.bias: [7], expected [128]" in found
    path.write_bytes(whole[: len(whole) // 2])
    assert str(path) in message()
    torch.save([1, 2], path)
    assert "holds no weights" in message()
    path.write_bytes(whole)
    (folder / "vocab.txt").write_text("\n".join(small.VOCABULARY[:-3]) + "\n", encoding="utf-8")
    assert f"the weights know {small.TEXT['vocab_size']}" in message()
    (folder / "vocab.txt").unlink()
    assert "bert-base-uncased" in message()  # offline
    (folder / "med_config.json").write_text("{")
    assert "med_config.json" in message()
    path.unlink()
    assert "ImageReward.pt" in message()
    assert "does not exist" in message(tmp_path / "nowhere" / "weights.pt")
    assert "hf download THUDM/ImageReward ImageReward.pt" in message("")  # offline
