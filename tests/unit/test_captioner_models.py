"""Captions by transformers models in this process: tiny ones of the real classes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffpref.captions import CAPTIONERS, Captioned
from diffpref.errors import UserError
from diffpref.language_models import loading
from tests import caption_models
from tests.caption_inputs import pictures, prompts

KINDS = ("llava", "blip", "florence")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each kind of model."""
    root = tmp_path_factory.mktemp("captioners")
    return {kind: getattr(caption_models, f"save_{kind}")(root / kind) for kind in KINDS}


def captioner(folder, **settings):
    return CAPTIONERS["transformers"](model=str(folder), **{"max_new_tokens": 12, **settings})


def edited(folder, target, file, **changes):
    """A copy of a model folder with other values in one of its JSON files."""
    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


@pytest.fixture
def with_prompt(tmp_path):
    """A template that makes the texts of a batch differ in length."""
    (tmp_path / "prompt.txt").write_text("a picture of {prompt} which shows")
    return str(tmp_path / "prompt.txt")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampled", [False, True])
def test_batches_equal_single_pictures_in_any_order(folders, with_prompt, kind, sampled):
    settings = {"temperature": 0.9, "top_p": 0.8} if sampled else {}
    if kind != "florence":  # its instruction is one token
        settings["template"] = with_prompt
    ask = captioner(folders[kind], batch_size=3, **settings)
    images, texts, rows = pictures(5), prompts(5), list(range(100, 105))
    together = ask(images, texts, rows)
    assert all(result.text and not result.failure for result in together)
    assert len({result.text for result in together}) == 5
    assert together == [ask([i], [t], [r])[0] for i, t, r in zip(images, texts, rows, strict=True)]
    assert together[::-1] == ask(images[::-1], texts[::-1], rows[::-1])
    assert together == captioner(folders[kind], batch_size=5, **settings)(images, texts, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_captions_equal_the_model_s_own_generation(folders, kind):
    """By an independent path: transformers as its documentation uses it, one picture at a time."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folders[kind])
    model = AutoModelForImageTextToText.from_pretrained(folders[kind])
    ask = captioner(folders[kind], max_new_tokens=6)
    image = pictures(1)[0]
    if kind == "llava":
        text = f"<s>user: <image>\n{ask._template.fill(prompt='a dog', tokens=60)}assistant:"
        inputs = processor(text=text, images=image, return_tensors="pt", add_special_tokens=False)
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
        tokens = tokens[inputs["input_ids"].shape[1] :]
    else:
        text = {"blip": "a picture of", "florence": "<DETAILED_CAPTION>"}[kind]
        inputs = processor(text=text, images=image, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)[0]
        # BLIP repeats the prompt without its end token
        tokens = tokens[inputs["input_ids"].shape[1] - 1 :] if kind == "blip" else tokens
    expected = processor.tokenizer.decode(tokens, skip_special_tokens=True).replace("\ufffd", "")
    (result,) = ask([image], ["a dog"], [0])
    assert result.text
    assert " ".join(expected.split()).startswith(result.text)  # ours ends at the last whole word


def test_captions_depend_on_picture_prompt_and_seed(folders):
    image, other = pictures(2)
    ask = captioner(folders["llava"])
    base = ask([image], ["a dog"], [0])
    assert base != ask([other], ["a dog"], [0])
    assert base != ask([image], ["two cats in the rain at night, oil painting"], [0])
    assert base == ask([image], ["a dog"], [1])  # greedy: rows draw nothing
    drawn = captioner(folders["llava"], temperature=1.0)
    assert drawn([image] * 4, ["a dog"] * 4, [0, 1, 2, 3]) == drawn([image] * 4, ["a dog"] * 4, range(4))
    assert len(set(drawn([image] * 4, ["a dog"] * 4, range(4)))) == 4
    assert drawn([image], ["a dog"], [0]) != captioner(folders["llava"], temperature=1.0, seed=1)(
        [image], ["a dog"], [0]
    )


def test_pictures_of_any_mode_and_commands_in_prompts(folders):
    """A prompt may hold what the model takes for a command: it must not count as a second picture."""
    image = pictures(1)[0]
    ask = captioner(folders["llava"])
    wanted = ask([image], ["a dog   x"], [0])
    assert wanted[0].text
    assert ask([image.convert("RGBA")], ["a dog <image> x"], [0]) == wanted
    assert ask([image], ["a dog</s> x"], [0]) == ask([image], ["a dog  x"], [0])
    grey = image.convert("L")
    assert ask([grey], ["a"], [0]) == ask([grey.convert("RGB")], ["a"], [0])
    assert ask([], [], []) == []


def test_the_template_is_the_user_s(folders, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("{tokens} words on {prompt}\n")
    ask = captioner(folders["llava"], template=str(file), max_tokens=20)
    assert ask._text("a {cat}") == "<s>user: <image>\n20 words on a {cat}assistant:"
    import hashlib

    digest = hashlib.sha256(b"{tokens} words on {prompt}").hexdigest()[:16]
    assert ask.provenance().template == digest
    assert captioner(folders["llava"]).provenance().template != digest


def test_provenance_names_the_folder_s_content(folders, tmp_path):
    first = captioner(folders["blip"], seed=5).provenance()
    assert (first.backend, first.model, first.seed) == ("transformers", str(folders["blip"]), 5)
    assert first.revision.startswith("sha256:")
    copy = shutil.copytree(folders["blip"], tmp_path / "copy")
    assert captioner(copy).provenance().revision == first.revision
    weights = load_file(copy / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    changed = shutil.copytree(copy, tmp_path / "changed")
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert captioner(changed).provenance().revision != first.revision


def test_a_picture_that_the_model_breaks_on_fails_alone(folders, tmp_path):
    """BLIP reads 256 positions: a longer prompt is that picture's failure, and so is a broken picture."""
    file = tmp_path / "t.txt"
    file.write_text("{prompt}")
    ask = captioner(folders["blip"], template=str(file))
    good, long, other = ask(pictures(3), ["a dog", "very " * 300, "a cat"], range(3))
    assert good.text
    assert other.text
    assert long == Captioned("", long.failure)
    assert "too long" in long.failure

    class Broken(Image.Image):
        def convert(self, *args, **kwargs):
            raise OSError("image file is truncated")

    images = [pictures(1)[0], Broken(), pictures(2)[1]]
    ask = captioner(folders["llava"])
    results = ask(images, ["a", "b", "c"], range(3))
    assert [bool(result.text) for result in results] == [True, False, True]
    assert "truncated" in results[1].failure
    assert results[0] == ask(images[:1], ["a"], [0])[0]


def test_nan_is_a_failure_and_no_caption(folders, tmp_path):
    broken = shutil.copytree(folders["llava"], tmp_path / "nan")
    weights = load_file(broken / "model.safetensors")
    norm = next(name for name in weights if name.endswith("model.norm.weight"))
    weights[norm] = torch.full_like(weights[norm], np.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for temperature in (0.0, 1.0):
        (result,) = captioner(broken, temperature=temperature)(pictures(1), ["a"], [0])
        assert result.text == ""
        assert "NaN" in result.failure


def test_weights_are_loaded_once(folders):
    loading.shared_network.cache_clear()
    for seed in (0, 1):
        captioner(folders["llava"], seed=seed)(pictures(1), ["a"], [0])
    assert loading.shared_network.cache_info().misses == 1


def test_precision_and_device_are_the_user_s(folders):
    captioner(folders["llava"], dtype="bf16", device="cpu")(pictures(1), ["a"], [0])
    with pytest.raises(UserError, match="cuda:77"):
        captioner(folders["llava"], device="cuda:77")(pictures(1), ["a"], [0])


def test_models_that_cannot_be_had(folders, tmp_path):
    with pytest.raises(UserError, match="model not found"):
        captioner(tmp_path / "nothing").provenance()
    with pytest.raises(UserError, match="no-such-org/no-such-model"):
        captioner("no-such-org/no-such-model").provenance()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load the model"):
        captioner(tmp_path / "empty").provenance()
    with pytest.raises(UserError, match="no image-text-to-text model") as raised:
        captioner(caption_models.save_t5(tmp_path / "t5")).provenance()
    assert "'t5'" in str(raised.value)
    with pytest.raises(UserError, match="has no effect"):
        captioner(folders["blip"], revision="main").provenance()


def test_code_from_a_repository_is_never_run(folders, tmp_path):
    own = edited(
        folders["blip"],
        tmp_path / "own",
        "config.json",
        model_type="ours",
        auto_map={"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"},
    )
    (own / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(UserError, match="runs no code"):
        captioner(own).provenance()
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_an_error(folders, tmp_path):
    """transformers would fill them with random numbers."""
    broken = shutil.copytree(folders["blip"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if "text_decoder" in name)
    del weights[name]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of its weights") as raised:
        captioner(broken)(pictures(1), ["a"], [0])
    assert name in str(raised.value)
    (broken / "model.safetensors").write_bytes(b"half")
    loading.find_source.cache_clear()
    with pytest.raises(UserError, match="cannot load the model"):
        captioner(broken)(pictures(1), ["a"], [0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_p": 0.5}, "has no effect"),
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": "fp8"}, "bf16"),
        ({"template": "missing.txt"}, "missing.txt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(UserError, match=said):
        CAPTIONERS["transformers"](model="org/name", **settings)


def test_a_length_that_is_not_asked_for_is_refused(folders):
    with pytest.raises(UserError, match="max_tokens = 20 has no effect"):
        captioner(folders["blip"], max_tokens=20).provenance()
