"""Pixels and tokens against torchvision's transforms and open_clip's tokenizer, bit for bit."""

from __future__ import annotations

import io

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from diffpref.data.images import decode_for_scoring
from diffpref.evaluators.pixels import OPENAI_MEAN, OPENAI_STD, Pixels
from diffpref.evaluators.texts import BytePairs
from diffpref.families.miniature import clip_tokenizer
from tests.clips import MODES, SIDE, SIZES, TEXTS, file_of, picture

every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
every_side = pytest.mark.parametrize("side", [SIDE, 224])
normalize = transforms.Normalize(OPENAI_MEAN, OPENAI_STD)
BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


@every_size
@every_side
def test_openais_crop(size, side):
    reference = transforms.Compose(
        [transforms.Resize(side, BICUBIC), transforms.CenterCrop(side), transforms.ToTensor(), normalize]
    )
    image = picture(*size)
    assert torch.equal(Pixels(side, "crop, round")(image), reference(image))


@pytest.mark.parametrize("mode", MODES)
def test_files_that_are_not_rgb(mode):
    """OpenAI's and open_clip's transforms resize what the file holds; transformers and HPS convert first."""
    data = file_of(mode)
    stored, opened = decode_for_scoring(data), Image.open(io.BytesIO(data))
    if mode == "I;16":  # the one difference: in all of them nearly every pixel would be white
        opened = Image.fromarray((np.asarray(opened) // 257).astype(np.uint8))
    for resize in (transforms.Resize(SIDE, BICUBIC), transforms.Resize((SIDE, SIDE), BICUBIC)):
        fit = "crop, round" if resize.size == SIDE else "squash"
        before, after = [resize, transforms.CenterCrop(SIDE)], [transforms.ToTensor(), normalize]
        reference = transforms.Compose([*before, lambda image: image.convert("RGB"), *after])
        assert torch.equal(Pixels(SIDE, fit, rgb="last")(stored), reference(opened))
        assert torch.equal(Pixels(SIDE, fit)(stored), reference(opened.convert("RGB")))
    ours = Pixels(SIDE, "crop, round", rgb="last")(stored)
    theirs = open_clip.image_transform(SIDE, is_train=False, mean=OPENAI_MEAN, std=OPENAI_STD)
    assert torch.equal(ours, theirs(opened))


@every_size
def test_bilinear_and_squashed(size):
    image = picture(*size)
    reference = transforms.Compose(
        [transforms.Resize((SIDE, SIDE), BILINEAR), transforms.ToTensor(), normalize]
    )
    assert torch.equal(Pixels(SIDE, "squash", resample="bilinear")(image), reference(image))


@every_size
@every_side
@pytest.mark.parametrize("fit", ["pad", "pad, aliased"])
def test_hps_padding(size, side, fit):
    """What the package's transform does to a float image: longest side, zeros around, then normalising."""
    image = picture(*size)
    values = functional.to_tensor(image)
    scale = side / max(values.shape[1:])
    height, width = (round(edge * scale) for edge in values.shape[1:])
    values = functional.resize(values, (height, width), BICUBIC, antialias=fit == "pad")
    left, top = (side - width) // 2, (side - height) // 2
    values = functional.pad(values, [left, top, side - width - left, side - height - top], fill=0)
    assert torch.equal(Pixels(side, fit)(image), normalize(values))


def test_torchvision_filters_by_default_today():
    """Which of the two HPS variants the package gives when run with this torchvision."""
    image = functional.to_tensor(picture(200, 200))
    default = functional.resize(image, (SIDE, SIDE), BICUBIC)
    assert torch.equal(default, functional.resize(image, (SIDE, SIDE), BICUBIC, antialias=True))
    assert not torch.equal(default, functional.resize(image, (SIDE, SIDE), BICUBIC, antialias=False))


def test_an_image_as_large_as_the_input_is_padded_too():
    """The package forgets to pad here and then fails in the network."""
    pixels = Pixels(SIDE, "pad")(Image.new("RGB", (SIDE, SIDE // 2), "white"))
    assert pixels.shape == (3, SIDE, SIDE)
    black = (torch.zeros(3) - torch.tensor(OPENAI_MEAN)) / torch.tensor(OPENAI_STD)
    assert torch.equal(pixels[:, 0, 0], black)
    assert torch.equal(pixels[:, -1, -1], black)
    assert not torch.equal(pixels[:, SIDE // 2, 0], black)


@pytest.mark.parametrize("text", TEXTS)
def test_cleaned_byte_pairs_are_openais_tokens(text):
    ours = BytePairs(clip_tokenizer(), 77, cleaned=True)(text)
    expected = open_clip.tokenize([text])[0]
    assert list(ours.ids) == expected[: len(ours.ids)].tolist()
    assert not expected[len(ours.ids) :].any()
    assert ours.cut == max(0, len(open_clip.tokenizer._tokenizer.encode(text)) + 2 - 77)
