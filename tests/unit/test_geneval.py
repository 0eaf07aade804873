"""The evaluator `geneval` end to end on small random models, and its two networks' input and output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer, Mask2FormerForUniversalSegmentation

from diffpref.errors import UserError
from diffpref.evaluators import DetailedEvaluator, Runtime, load_evaluators
from diffpref.evaluators.geneval.colours import TEMPLATES, crop_object
from diffpref.evaluators.geneval.detector import Detector, prepare
from diffpref.evaluators.geneval.evaluator import GenEval, load
from diffpref.evaluators.geneval.rules import Detection
from diffpref.evaluators.geneval.words import COLORS, NAMES
from diffpref.evaluators.pixels import Pixels
from tests.geneval_models import LABELS, write_clip, write_detector

DOG = NAMES.index("dog")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("geneval")
    return {
        "sure": write_detector(root / "sure", sure_of="dog"),
        "unsure": write_detector(root / "unsure"),
        "clip": write_clip(root / "clip"),
    }


def weights(folders: dict[str, Path], detector: str = "sure") -> str:
    return f"{folders[detector]},{folders['clip']}"


@pytest.fixture(scope="module")
def evaluator(folders: dict[str, Path]) -> GenEval:
    return load(Runtime(weights=weights(folders), batch=2))


@pytest.fixture(scope="module")
def detector(evaluator: GenEval) -> Detector:
    return evaluator.finder


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)


def logits(*sure: tuple[int, int, float]) -> torch.Tensor:
    """[2, 81] in which each (query, class, probability) holds; what is left is "nothing"."""
    found = torch.full((2, 81), 1e-9)
    for query, label, probability in sure:
        found[query, label] = probability
    found[:, 80] = 1 - found[:, :80].sum(1)
    return found.log()


def test_raw_outputs_become_boxes_masks_and_scores_at_the_size_of_the_image(detector: Detector) -> None:
    masks = torch.full((2, 8, 8), -30.0)
    masks[0, :, :4] = 2.0
    # the input is 32 x 32, of which the image, 64 x 96 pixels, fills the upper 24 rows
    (found,) = detector.detections(logits((0, DOG, 0.8)), masks, (32, 32), (24, 32), (64, 96))
    assert found.name == "dog"
    assert found.mask.shape == (64, 96)
    # two cells of 4 pixels pass from 2 to -30, which is 0 after 2/32 of the way, past the left one's centre
    left, top, right, bottom = found.box
    assert (left, top, bottom) == (0, 0, 64)
    assert 14 * 3 <= right <= 15 * 3
    assert found.mask.any(0).sum() == right
    assert found.score == pytest.approx(0.8 * torch.sigmoid(torch.tensor(2.0)).item(), abs=0.02)


def test_the_score_is_the_class_times_the_mean_of_the_mask(detector: Detector) -> None:
    masks = torch.full((2, 8, 8), 1.0)
    whole = detector.detections(
        logits((0, DOG, 0.45), (0, 1, 0.5), (1, 2, 0.41)), masks, (32, 32), (32, 32), (10, 20)
    )
    inside = torch.sigmoid(torch.tensor(1.0)).item()  # 0.731
    assert [(d.name, d.box) for d in whole] == [("bicycle", (0, 0, 20, 10)), ("dog", (0, 0, 20, 10))]
    assert [d.score for d in whole] == pytest.approx([0.5 * inside, 0.45 * inside], abs=1e-6)  # 0.41: below


def test_all_objects_of_an_image_are_fetched_together(detector: Detector, fetched: list[torch.Size]) -> None:
    masks = torch.full((2, 8, 8), 20.0)
    found = detector.detections(logits((0, DOG, 0.9), (1, DOG, 0.8)), masks, (32, 32), (24, 32), (24, 32))
    assert [one.score for one in found] == pytest.approx([0.9, 0.8], abs=1e-5)
    assert fetched == [(2, 24, 32)]


def test_a_mask_in_the_padding_alone_is_no_object(detector: Detector) -> None:
    masks = torch.full((2, 8, 8), -5.0)
    masks[:, 7] = 5.0
    assert not detector.detections(logits((0, DOG, 0.99)), masks, (32, 32), (24, 32), (24, 32))
    assert detector.detections(logits((0, DOG, 0.99)), masks, (32, 32), (32, 32), (24, 32))


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 768), (800, 1067), (800, 1088)),
        ((400, 1600), (1333, 333), (1344, 352)),
        ((1, 1), (800, 800), (800, 800)),
        ((1, 4000), (1333, 1), (1344, 32)),
    ],
)
def test_the_detector_sees_images_at_the_published_size(
    size: tuple[int, int], resized: tuple[int, int], padded: tuple[int, int]
) -> None:
    pixels, inner = prepare(Image.new("RGB", size, "white"))
    assert inner == resized
    assert tuple(pixels.shape) == (1, 3, *padded)
    shown = pixels[0, :, : inner[0], : inner[1]].reshape(3, -1)  # (1 - mean) / deviation of ImageNet
    for values, white in zip(shown, (2.2489, 2.4286, 2.6400), strict=True):
        assert values.min() == values.max() == pytest.approx(white, abs=1e-4)
    assert not pixels[:, :, resized[0] :].any()
    assert not pixels[:, :, :, resized[1] :].any()


def test_a_crop_shows_the_object_on_grey() -> None:
    image = Image.new("RGB", (8, 6), "red")
    mask = np.zeros((6, 8), np.bool_)
    mask[1:3, 2:7] = mask[3, 4] = True
    crop = np.asarray(crop_object(image, Detection("dog", 1.0, (2.0, 1.0, 7.0, 4.0), mask)))
    expected = np.full((3, 5, 3), 0x99)
    expected[:2] = expected[2, 2] = (255, 0, 0)
    assert np.array_equal(crop, expected)


def test_colours_equal_transformers_own_zero_shot_classification(
    evaluator: GenEval, folders: dict[str, Path]
) -> None:
    crops = [picture(seed, (30 + seed, 41)) for seed in range(12)]
    names = ["dog", "traffic light"] * 6
    model = CLIPModel.from_pretrained(folders["clip"]).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folders["clip"])
    expected = []
    for crop, name in zip(crops, names, strict=True):
        best = []
        for color in COLORS:
            texts = [template.format(color=color, name=name) for template in TEMPLATES]
            pixels = Pixels(32, "crop, round")(crop)[None]
            with torch.no_grad():
                output = model(**tokenizer(texts, padding=True, return_tensors="pt"), pixel_values=pixels)
            mean = output.text_embeds.mean(0)
            best.append(float(output.image_embeds[0] @ mean / mean.norm()))
        expected.append(COLORS[int(np.argmax(best))])
    assert evaluator.namer.name(crops, names) == expected
    assert len(set(expected)) > 1
    assert evaluator.namer.name([], []) == []


def test_images_are_judged_and_the_reasons_given(evaluator: GenEval) -> None:
    images = [picture(seed) for seed in range(5)]
    prompts = [
        "a photo of a dog",
        "a photo of a cat",
        "a photo of two dogs",  # random masks are half sure: nothing is above the counting threshold
        "a photo of a dog left of a cat",
        "a photo of a dog and a cat",
    ]
    scores, details = evaluator.explain(images, prompts)
    assert scores.dtype == np.float32
    assert scores.tolist() == [1, 0, 0, 0, 0]
    assert details["reason"] == ["", "no cat", "no dog", "no cat", "no cat"]
    assert details["found"][0] == "10 dog"
    assert details["found"][2] == "nothing"
    assert evaluator.score([], []).shape == (0,)


def test_exactly_the_colour_that_clip_names_is_correct(evaluator: GenEval) -> None:
    scores, details = evaluator.explain([picture(7)] * 10, [f"a photo of a {color} dog" for color in COLORS])
    assert scores.sum() == 1
    named = COLORS[int(scores.argmax())]
    assert set(details["found"]) == {f"10 dog ({named})"}
    assert f"dog is {named}, not {COLORS[int(scores.argmin())]}" in details["reason"]


def test_a_verdict_does_not_depend_on_batch_mates_or_order(evaluator: GenEval) -> None:
    images = [picture(seed, (40 + 7 * seed, 60 - 5 * seed)) for seed in range(3)]
    prompts = [f"a photo of a {COLORS[0]} dog", f"a photo of a {COLORS[1]} dog", "a photo of a cow"]
    scores, details = evaluator.explain(images, prompts)
    for index in range(3):
        alone = evaluator.explain(images[index : index + 1], prompts[index : index + 1])
        assert alone[0][0] == scores[index]
        assert alone[1]["found"][0] == details["found"][index]
    assert evaluator.explain(images[::-1], prompts[::-1])[1]["found"] == details["found"][::-1]


def test_an_image_with_several_prompts_is_looked_at_once(evaluator: GenEval) -> None:
    looked: list[int] = []
    hook = evaluator.finder.model.register_forward_hook(lambda *_: looked.append(1))
    images = [picture(0), picture(1), picture(0), picture(0)]
    prompts = ["a photo of a dog", "a photo of two dogs", f"a photo of a {COLORS[2]} dog", "a photo of a cow"]
    _, details = evaluator.explain(images, prompts)
    assert len(looked) == 2
    apart = [evaluator.explain([image], [text])[1] for image, text in zip(images, prompts, strict=True)]
    hook.remove()
    for column in ("found", "reason"):
        assert details[column] == [each[column][0] for each in apart]
    assert len(set(details["reason"])) > 2


def test_it_is_listed_and_says_what_it_is(folders: dict[str, Path]) -> None:
    found = [
        load_evaluators(["geneval"], {"geneval": Runtime(weights=weights(folders, name), dtype=dtype)})[0]
        for name, dtype in (("sure", "fp32"), ("unsure", "fp32"), ("sure", "bf16"))
    ]
    assert isinstance(found[0], DetailedEvaluator)
    assert "geneval-like" in found[0].version
    assert "bf16" in found[2].version
    assert len({each.fingerprint for each in found}) == 3
    assert set(found[0].columns()) == {"geneval", "geneval.reason", "geneval.found"}
    assert [float(each.score([picture(0)], ["a photo of a dog"])[0]) for each in found] == [1, 0, 1]


def test_other_prompts_are_refused(evaluator: GenEval) -> None:
    with pytest.raises(UserError, match="GenEval-style prompts"):
        evaluator.score([picture(0)], ["a castle in the clouds"])


def test_wrong_weights_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    def message(spec: str) -> str:
        with pytest.raises(UserError) as raised:
            load(Runtime(weights=spec))
        return str(raised.value)

    assert "'clip'" in message(f"{folders['clip']},{folders['clip']}")
    assert "CLIP" in message(f"{folders['sure']},{folders['sure']}")
    fewer = write_detector(tmp_path / "fewer", labels={k: v for k, v in LABELS.items() if k < 78})
    assert "lack 2 of 80: hair drier, toothbrush" in message(f"{fewer},{folders['clip']}")
    assert "hf download facebook/mask2former" in message("")  # offline
    assert "hf download openai/clip-vit-large-patch14" in message(str(folders["sure"]))
    nan = Mask2FormerForUniversalSegmentation.from_pretrained(folders["sure"])
    torch.nn.init.constant_(nan.class_predictor.bias, torch.nan)
    nan.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="no finite output"):
        load(Runtime(weights=f"{tmp_path / 'nan'},{folders['clip']}")).score(
            [picture(0)], ["a photo of a dog"]
        )
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((folders["sure"] / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((folders["clip"] / "model.safetensors").read_bytes())
    assert "missing class_predictor.bias" in message(f"{broken},{folders['clip']}")
    (broken / "model.safetensors").write_bytes(b"PK" * 40)
    assert str(broken) in message(f"{broken},{folders['clip']}")
    assert "does not exist" in message(f"{tmp_path / 'no' / 'where'},{folders['clip']}")
