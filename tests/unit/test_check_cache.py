"""`diffpref check CACHE`: every kind of damage is found, named with its file, and repaired as it says."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffpref.config import load_train_config
from diffpref.data import cache_parts
from diffpref.data.cache_check import check_cache
from diffpref.errors import UserError
from diffpref.families.miniature import stable_diffusion
from diffpref.paths import fingerprint, sha256_file
from diffpref.training.encode import EncodeOptions, encode
from tests.miniatures import config, diffpref_here, rows, write_config, write_pairs

SHARD = "train/latents/00001.safetensors"
TEXTS = "train/text-shared/00000.safetensors"
INDEX = "train/text-shared/index.safetensors"


@pytest.fixture(scope="module", params=["square", "buckets"])
def made(tmp_path_factory, request):
    """(a good cache, how to encode it again): one with a pair left out, in several files."""
    place = tmp_path_factory.mktemp("made")
    table = rows(11, sizes=((32, 32), (40, 80)) if request.param == "buckets" else ((32, 32),))
    table[6]["jpg_0"] = b"junk"
    tree = config(
        stable_diffusion(place / "model"), write_pairs(place / "pairs.parquet", table), place / "run",
        data__max_bad_share=0.1, data__aspect=request.param, data__resolution=64, data__flip="shared",
    )  # fmt: skip
    settings = load_train_config(write_config(place / "c.toml", tree), [])
    shards = {"SHARD_PAIRS": 4, "SHARD_CAPTIONS": 3}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in shards.items():
            patch.setattr(cache_parts, name, value)
        yield encode(settings), lambda options=None: encode(settings, options)


@pytest.fixture
def cache(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made[0], tmp_path / "cache")


def message(folder):
    """What check prints, when it fails."""
    out = io.StringIO()
    with pytest.raises(UserError) as caught:
        check_cache(folder, out)
    return out.getvalue() + str(caught.value)


def test_a_good_cache_is_good_from_each_of_its_folders(cache):
    for place, parts in ((cache, 2), (cache / "train", 2), (cache / "train/latents", 1)):
        out = io.StringIO()
        reports = check_cache(place, out)
        assert len(reports) == out.getvalue().count("  good\n") == parts
    assert "10 pairs, 1 left out" in out.getvalue()


@pytest.mark.parametrize("name", [SHARD, TEXTS, INDEX])
@pytest.mark.parametrize("at", [3, 40, 0.5, -1])
def test_one_changed_bit_is_found_wherever_it_is(cache, name, at):
    data = bytearray((cache / name).read_bytes())
    data[int(at * len(data)) if isinstance(at, float) else at] ^= 4
    (cache / name).write_bytes(data)
    text = message(cache)
    assert f"{cache / name}: its bytes are not those that were written" in text
    assert "1 problem in the cache" in text
    assert text.count("  good\n") == 1


@pytest.mark.parametrize("name", [SHARD, TEXTS, INDEX])
def test_a_file_that_is_cut_off_missing_or_a_stranger(cache, name):
    whole = (cache / name).read_bytes()
    (cache / name).write_bytes(whole[:-7])
    assert f"{cache / name}: it has {len(whole) - 7:,} bytes instead of {len(whole):,}" in message(cache)
    (cache / name).unlink()
    assert f"{cache / name}: it is missing" in message(cache)
    (cache / name).write_bytes(whole)
    stranger = (cache / name).with_name("00099.safetensors")
    stranger.write_bytes(whole)
    assert f"{stranger}: the manifest does not name it" in message(cache)


@pytest.mark.parametrize("name", [SHARD, TEXTS])
@pytest.mark.parametrize("manifest_too", [False, True])
def test_the_repair_it_names_works_and_makes_only_that_file_again(made, name, manifest_too):
    folder, again = made
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:100] + b"\xff" + whole[101:])
    text = message(folder)
    assert "remove the files named above and run diffpref encode" in text
    (folder / name).unlink()
    if manifest_too:
        (folder / name).with_name("manifest.json").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("0*.safetensors")}
    again()
    assert (folder / name).read_bytes() == whole
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(check_cache(folder, io.StringIO())) == 2


def forge(cache, name, change):
    """Change tensors of a file and let the manifest know, as a bug of a writer would."""
    path = cache / name
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        about = opened.metadata()
    change(tensors)
    save_file(tensors, path, about)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def latents_of(tensors):
    return next(name for name in sorted(tensors) if name.startswith("mean/"))


def spoil(value):
    def change(tensors):
        tensors[latents_of(tensors)].view(-1)[5] = value

    return change


@pytest.mark.parametrize(("name", "change", "text"), [
    (SHARD, spoil(float("nan")), "is not finite"),
    (SHARD, spoil(float("inf")), "is not finite"),
    (TEXTS, lambda t: t["prompt_embeds"].view(-1).fill_(float("nan")), "prompt_embeds is not finite"),
    (SHARD, lambda t: t.pop("crop"), "it has no crop"),
    (SHARD, lambda t: t.pop(latents_of(t)), "it has no mean/"),
    (SHARD, lambda t: t.update(other=torch.zeros(1)), "neither latents nor about pairs"),
    (SHARD, lambda t: t.update({latents_of(t): t[latents_of(t)].half()}), "instead of float32"),
    (SHARD, lambda t: t.update({latents_of(t): t[latents_of(t)][:, :, :1].contiguous()}), "instead of"),
    (SHARD, lambda t: t.update({latents_of(t): t[latents_of(t)][..., :2].contiguous()}), "unlike others"),
    (SHARD, lambda t: t.update(pair_id=t["pair_id"][:2].contiguous()), "pair_id is int64 [2] instead of"),
    (SHARD, lambda t: t["row"].add_(1), "pairs do not point at latents of their own"),
    (SHARD, lambda t: t["index"].sub_(4), "its pairs are not in the order of the table"),
    (SHARD, lambda t: t["pair_id"].fill_(7), "pairs are there twice"),
    ("train/latents/00002.safetensors", lambda t: t["index"].add_(50), "beyond the 11 pairs that it counts"),
    (INDEX, lambda t: t["loser"].fill_(6), "losers have captions that are not among the 6"),
    (INDEX, lambda t: t.update(loser=t["loser"][1:].contiguous()), "loser is int64 [10] instead of"),
    (INDEX, lambda t: t.update({n: t[n][1:].contiguous() for n in t}), "of 10 rows, and there are 11"),
    (TEXTS, lambda t: t.update(prompt_embeds=t["prompt_embeds"][1:].contiguous()), "the files hold 5"),
    (TEXTS, lambda t: t.update(more=torch.zeros(3, 1)), "unlike others"),
])  # fmt: skip
def test_what_no_hash_tells(cache, name, change, text):
    forge(cache, name, change)
    assert text in message(cache)


def edit(path, change):
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(("part", "change", "text"), [
    ("latents", lambda m: m["key"].update(resolution=8), "its key and the hash of it differ"),
    ("latents", lambda m: m["key"].update(format=2), "another version of diffpref"),
    ("latents", lambda m: m.pop("files"), "it cannot be read (KeyError"),
    ("latents", lambda m: m.update(pairs=9), "it counts 9 pairs, and the files hold 10"),
    ("latents", lambda m: m.update(bad=0), "captions of 11 rows, and there are 10"),
    ("text-shared", lambda m: m.update(count=7), "it counts 7 captions, and the files hold 6"),
])  # fmt: skip
def test_a_manifest_that_does_not_fit(cache, part, change, text):
    edit(cache / "train" / part / "manifest.json", change)
    assert text in message(cache)


def test_files_of_another_cache(cache):
    path = cache / "train/text-shared/manifest.json"
    edit(path, lambda m: m["key"].update(text="another"))
    edit(path, lambda m: m.update(key_hash=fingerprint(m["key"])))
    assert f"{cache / TEXTS}: it belongs to another cache" in message(cache)


def test_an_unfinished_cache_is_told_from_a_damaged_one(made, tmp_path):
    settings = load_train_config(made[0].parent.parent / "c.toml", [("data.cache_dir", str(tmp_path / "c"))])
    encode(settings, EncodeOptions(shard=(0, 2)))
    assert "the cache is unfinished, and diffpref encode continues it" in message(tmp_path / "c")


def test_the_command_tells_a_cache_from_pairs(cache):
    assert diffpref_here("check", cache)[0] == 0
    (cache / SHARD).unlink()
    code, printed = diffpref_here("check", cache)
    assert code == 2
    assert f"{cache / SHARD}: it is missing" in printed
    code, printed = diffpref_here("check", cache, "--captions", "dual")
    assert code == 2
    assert "is a cache" in printed
    shutil.rmtree(cache / "train")
    code, printed = diffpref_here("check", cache)
    assert code == 2
    assert "no Parquet file in the folder" in printed
