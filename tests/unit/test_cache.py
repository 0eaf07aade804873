"""The latent and text cache: right values, resumable, keyed by everything that shapes it."""

from __future__ import annotations

import contextlib

import pytest
import torch

from diffpref.config import DataConfig, ModelConfig
from diffpref.data import cache_parts as cache_module
from diffpref.data import cached
from diffpref.data.cache import build_cache, finish, locked_build, prepare
from diffpref.data.encoding import Encoder
from diffpref.data.images import as_tensor, decode_image, to_pixels
from diffpref.data.pairs import open_pairs
from diffpref.data.parts import _staging, staged
from diffpref.errors import UserError
from diffpref.families import load_family
from diffpref.families.miniature import stable_diffusion
from tests.miniatures import rows, write_pairs


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return load_family(ModelConfig(base=str(stable_diffusion(tmp_path_factory.mktemp("sd") / "model"))))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_PAIRS", 4)
    monkeypatch.setattr(cache_module, "SHARD_CAPTIONS", 3)


def build(tmp_path, family, table=None, named=False, folder="cache", **settings):
    path = tmp_path / "pairs.parquet"
    if table is not None or not path.exists():
        write_pairs(path, rows(10) if table is None else table)
    data = DataConfig(pairs=str(path), **({"resolution": 32} | settings))
    opened = open_pairs(data.pairs, data.columns, data.captions, data.max_bad_share)
    return build_cache(opened, family, data, tmp_path / folder, named)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))
    }


def test_latents_are_the_vaes_winner_first(tmp_path, family):
    table = rows(10)
    cache = build(tmp_path, family, table)
    assert len(cache) == 10
    found = cache.latents([7, 2])
    mean, logvar = found.mean, found.logvar
    assert mean.shape == logvar.shape == (2, 2, 4, 4, 4)
    for position, number in enumerate([7, 2]):
        row = table[number]
        winner, loser = ("jpg_0", "jpg_1") if row["label_0"] == 1 else ("jpg_1", "jpg_0")
        for side, name in enumerate((winner, loser)):
            expected = family.codec.encode(as_tensor([to_pixels(decode_image(row[name]), (32, 32))]))
            assert torch.allclose(mean[position, side], expected[0][0], atol=1e-6)
            assert torch.allclose(logvar[position, side], expected[1][0], atol=1e-5)


@pytest.mark.parametrize("captions", ["shared", "dual"])
def test_each_image_gets_its_own_caption(tmp_path, family, captions):
    table = rows(10)
    cache = build(tmp_path, family, table, captions=captions)
    for number, row in enumerate(table):
        first_wins = row["label_0"] == 1
        if captions == "shared":
            texts = [row["caption"], row["caption"]]
        else:
            texts = (
                [row["caption_0"], row["caption_1"]] if first_wins else [row["caption_1"], row["caption_0"]]
            )
        found = cache.conditioning(cache.captions([number])[0].tolist())["prompt_embeds"]
        assert torch.allclose(found, family.encode_prompts(texts)["prompt_embeds"], atol=1e-5)
    assert torch.allclose(
        cache.conditioning([0])["prompt_embeds"], family.encode_prompts([""])["prompt_embeds"], atol=1e-5
    )


def test_unique_captions_are_encoded_once_and_long_ones_counted(tmp_path, family):
    table = rows(10)
    table[3]["caption"] = "q" * 400
    cache = build(tmp_path, family, table)
    assert cache.text_manifest["count"] == 7  # five words, the long one, the empty prompt
    assert cache.text_manifest["truncated"] == 1


def test_flipped_variants_are_of_flipped_pixels(tmp_path, family):
    table = rows(10)
    cache = build(tmp_path, family, table, flip="shared")
    plain = cache.latents([1], [(False, False)]).mean
    flipped = cache.latents([1], [(True, True)]).mean
    pixels = as_tensor([to_pixels(decode_image(table[1]["jpg_0"]), (32, 32))]).flip(-1)
    assert torch.allclose(flipped[0, 0], family.codec.encode(pixels)[0][0], atol=1e-6)
    assert not torch.allclose(plain, flipped, atol=1e-3)


def test_without_flips_nothing_is_stored_for_them(tmp_path, family):
    build(tmp_path, family)
    size = (tmp_path / "cache/latents/00000.safetensors").stat().st_size
    assert size < 4 * 2 * 64 * 4 * 2 + 2000  # 4 pairs x 2 images x 64 values x 4 bytes x (mean, logvar)


def test_unfinished_builds_continue_and_give_the_same_bytes(tmp_path, family):
    build(tmp_path, family, folder="whole")
    whole = contents(tmp_path / "whole")
    build(tmp_path, family)
    folder = tmp_path / "cache"
    (folder / "latents/manifest.json").unlink()
    (folder / "latents/00001.safetensors").unlink()
    (folder / "text-shared/manifest.json").unlink()
    (folder / "text-shared/index.safetensors").unlink()
    kept = (folder / "latents/00002.safetensors").stat().st_mtime_ns
    cache = build(tmp_path, family)
    assert len(cache) == 10
    assert contents(folder) == whole
    assert (folder / "latents/00002.safetensors").stat().st_mtime_ns == kept


def test_a_finished_cache_is_not_touched(tmp_path, family):
    build(tmp_path, family)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    build(tmp_path, family)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}


def test_worker_processes_give_the_same_bytes(tmp_path, family):
    build(tmp_path, family, folder="alone")
    build(tmp_path, family, folder="several", workers=2)
    assert contents(tmp_path / "alone") == contents(tmp_path / "several")


def test_shares_are_disjoint_and_whoever_ends_last_writes_the_manifests(tmp_path, family):
    build(tmp_path, family, folder="whole")
    data = DataConfig(pairs=str(tmp_path / "pairs.parquet"), resolution=32)
    table, folder = open_pairs(data.pairs), tmp_path / "cache"
    made = []
    for share in (2, 0, 1):
        parts = prepare(table, family, data, folder, False)
        for part in parts:
            for task in part.missing(share, 3):
                made.append(task.path)
                assert sum(Encoder(table, family, data).make(task)) == task.size
        left = finish(parts, folder)
        assert (left == 0) == (share == 1)
        assert len(list(folder.rglob("manifest.json"))) == (2 if left == 0 else 0)
    assert len(made) == len(set(made)) == 3 + 2
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_cache_of_another_model_is_an_error_where_the_user_named_it(tmp_path, family):
    build(tmp_path, family, named=True)
    other = load_family(ModelConfig(base=str(stable_diffusion(tmp_path / "other", seed=1))))
    with pytest.raises(UserError, match="another model's VAE"):
        build(tmp_path, other, named=True)
    first = build(tmp_path, family, named=True)  # and the refused attempt left it as it was
    rebuilt = build(tmp_path, other, named=False)
    assert rebuilt.fingerprint != first.fingerprint


@pytest.mark.parametrize("change", [{"flip": "shared"}, {"resolution": 48}])
def test_settings_are_part_of_the_key(tmp_path, family, change):
    build(tmp_path, family, named=True)
    data = DataConfig(**({"pairs": str(tmp_path / "pairs.parquet"), "resolution": 32} | change))
    with pytest.raises(UserError, match="made for something else"):
        build_cache(open_pairs(data.pairs), family, data, tmp_path / "cache", True)


def test_a_folder_that_cannot_be_made(tmp_path, family):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/cache"):
        build(tmp_path, family, folder="file/cache")


def test_changed_pairs_are_noticed(tmp_path, family):
    build(tmp_path, family, named=True)
    with pytest.raises(UserError, match="other pairs"):
        build(tmp_path, family, rows(10, first=20), named=True)


def test_dual_and_shared_captions_share_the_latents_of_one_folder(tmp_path, family):
    shared = build(tmp_path, family, named=True, captions="shared")
    stamp = (tmp_path / "cache/latents/00000.safetensors").stat().st_mtime_ns
    dual = build(tmp_path, family, named=True, captions="dual")
    assert (tmp_path / "cache/latents/00000.safetensors").stat().st_mtime_ns == stamp
    assert shared.manifest == dual.manifest
    assert [part.text_manifest["count"] for part in (shared, dual)] == [6, 11]


def test_bad_and_identical_images_are_left_out_and_named(tmp_path, family):
    table = rows(10)
    table[2]["jpg_1"] = b"not an image"
    table[5]["jpg_1"] = table[5]["jpg_0"]
    cache = build(tmp_path, family, table, max_bad_share=0.2)
    assert len(cache) == 8
    assert cache.manifest["bad"] == 1
    assert cache.manifest["identical"] == 1
    assert "row 2" in cache.manifest["first_bad"][0]["row"]
    ids = open_pairs(tmp_path / "pairs.parquet")
    assert cache.pair_ids == [ids.pair_id(number) for number in range(10) if number not in (2, 5)]


def test_too_many_bad_rows_stop_the_build(tmp_path, family):
    table = rows(10)
    table[2]["jpg_1"] = b""
    with pytest.raises(UserError, match="1 of 10 rows"):
        build(tmp_path, family, table)


def test_latents_in_half_precision_take_half_the_disk_and_are_nearly_the_same(tmp_path, family):
    full, half = build(tmp_path, family), build(tmp_path, family, folder="half", latent_precision="fp16")
    a, b = full.latents([3, 1]).mean, half.latents([3, 1]).mean
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert torch.allclose(a, b, rtol=2**-11, atol=1e-6)
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name / "latents").glob("*.safetensors"))
        for name in ("cache", "half")
    ]
    values = 10 * 2 * 64 * 2  # pairs, images, latent values, mean and log-variance
    assert sizes[0] - sizes[1] == pytest.approx(values * 2, abs=200)


def test_a_pair_of_odd_shapes_goes_to_a_bucket_with_its_sizes_and_crops(tmp_path, family):
    table = rows(4, sizes=((48, 96), (40, 100)))
    cache = build(tmp_path, family, table, aspect="buckets", flip="shared", resolution=64)
    height, width = cache.sizes[0].tolist()
    assert height < width
    plain, mirrored = (cache.latents([0, 1], [(flip, flip)] * 2) for flip in (False, True))
    assert plain.mean.shape == (2, 2, 4, height // 8, width // 8)
    assert plain.size == (height, width)
    # row 0 is won by image 1, row 1 by image 0: images 1 and 2 of the table have 40 x 100 and 48 x 96 pixels
    assert plain.original.tolist() == [[[40, 100], [48, 96]], [[48, 96], [40, 100]]]
    for pair in range(2):
        for side in range(2):
            tall, wide = plain.original[pair, side].tolist()
            scale = max(height / tall, width / wide)
            top, left = plain.crop[pair, side].tolist()
            assert top == (max(height, round(tall * scale)) - height) // 2
            assert left == (max(width, round(wide * scale)) - width) // 2
            rest = max(width, round(wide * scale)) - width - left
            assert mirrored.crop[pair, side].tolist() == [top, rest]


@pytest.mark.parametrize("file", ["latents/00001", "text-shared/00001", "text-shared/index"])
def test_a_changed_byte_is_not_trained_on(tmp_path, family, file):
    """Of the same size, so that nothing but its SHA-256 tells; found when the file is first used."""
    build(tmp_path, family)
    path = tmp_path / "cache" / f"{file}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))

    def use():
        cache = build(tmp_path, family)
        cache.latents([0])  # another file
        cache.conditioning([0])
        cache.latents([5])
        cache.conditioning([4])

    with pytest.raises(UserError, match=f"{file}.safetensors is damaged") as caught:
        use()
    assert caught.value.why == "it has other bytes than when it was made"
    assert "remove that file" in caught.value.fix
    before = contents(tmp_path / "cache")
    path.unlink()
    use()
    repaired = contents(tmp_path / "cache")
    assert {name for name in before if before[name] != repaired[name]} == {f"{file}.safetensors"}


def test_each_file_is_hashed_once_in_a_run(tmp_path, family, monkeypatch):
    build(tmp_path, family)
    hashed = []
    real = cached.sha256_file
    monkeypatch.setattr(cached, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    cache = build(tmp_path, family)
    assert hashed == ["index.safetensors"]  # latents and text wait until they are used
    for _ in range(3):
        cache.latents([0, 9])
        cache.conditioning([0])
    assert hashed == ["index.safetensors", "00000.safetensors", "00002.safetensors", "00000.safetensors"]


def test_a_build_waits_for_another_of_the_same_cache(tmp_path, family, caplog):
    waited = []

    def check():
        waited.append(True)
        if len(waited) == 3:
            other.close()

    other = contextlib.ExitStack()
    other.enter_context(locked_build(tmp_path, lambda: None))
    with caplog.at_level("INFO", "diffpref"), locked_build(tmp_path, check):
        assert len(waited) == 3
    assert caplog.text.count("another run encodes into") == 1


def test_a_link_in_place_of_a_file_that_is_being_written_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("kept")
    part = tmp_path / "00000.safetensors"
    _staging(part).symlink_to(target)
    with pytest.raises(UserError), staged(part) as stream:
        stream.write(b"x")
    assert target.read_text() == "kept"
