"""`diffpref encode`: the same bytes whoever makes them, the disk named first, single files repaired."""

from __future__ import annotations

import re

import pytest

from diffpref.config import load_train_config
from diffpref.data import cache_need, cache_parts
from diffpref.errors import UserError
from diffpref.families.miniature import stable_diffusion
from diffpref.training.encode import EncodeOptions, encode
from diffpref.training.run import train
from tests.miniatures import config, rows, write_config, write_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_parts, "SHARD_PAIRS", 4)
    monkeypatch.setattr(cache_parts, "SHARD_CAPTIONS", 3)


@pytest.fixture
def make(tmp_path, model):
    """make(name, options, **settings): encode into a folder of that name, which is returned."""
    table = rows(18)
    table[5]["jpg_0"] = b"junk"
    pairs = write_pairs(tmp_path / "pairs.parquet", table)
    held_out = write_pairs(tmp_path / "held-out.parquet", rows(5, first=40))

    def run(name="cache", options=None, **settings):
        changes = {"data__max_bad_share": 0.1, "data__validation": str(held_out), **settings}
        tree = config(model, pairs, tmp_path / "run", data__cache_dir=str(tmp_path / name), **changes)
        return encode(load_train_config(write_config(tmp_path / "c.toml", tree), []), options)

    return run


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("options", [
    EncodeOptions(workers=2),
    pytest.param(EncodeOptions(engine="ray", workers=2), marks=pytest.mark.slow),
], ids=["workers", "ray"])  # fmt: skip
def test_several_processes_and_ray_give_the_bytes_of_one(make, options):
    assert contents(make("several", options)) == contents(make("one"))


def test_shards_give_the_bytes_of_one_and_the_last_completes_the_cache(make, caplog):
    caplog.set_level("INFO", "diffpref")
    whole = contents(make("whole"))
    for index in (2, 0, 1):
        folder = make("shards", EncodeOptions(shard=(index, 3)))
        complete = index == 1
        assert bool(list(folder.rglob("manifest.json"))) == complete
        assert ("files of others are missing" in caplog.messages[-1]) == (not complete)
    assert contents(folder) == whole


def test_launched_processes_share_a_shard(make, monkeypatch):
    whole = contents(make("whole"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        folder = make("launched")
        assert bool(list(folder.rglob("manifest.json"))) == (rank == 0)
    assert contents(folder) == whole
    with pytest.raises(UserError, match="do not go with accelerate launch"):
        make("other", EncodeOptions(workers=2))


@pytest.mark.parametrize("settings", [
    {}, {"data__flip": "shared", "data__latent_precision": "fp16"}, {"data__captions": "dual"},
    {"data__cache_latents": False},
])  # fmt: skip
def test_the_disk_is_named_before_it_is_taken(make, capsys, settings):
    folder = make(**settings)
    said = re.search(r"all +([\d.]+) ([kM])B", capsys.readouterr().out)
    assert said is not None
    taken = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    headers = 1500 * len(list(folder.rglob("*.safetensors")))  # large beside such small files
    assert abs(float(said[1]) * {"k": 1e3, "M": 1e6}[said[2]] - taken) < 0.01 * taken + headers
    make(**settings)
    assert capsys.readouterr().out == ""  # nothing is left to take


def test_buckets_are_estimated_from_headers_within_bounds(tmp_path, make, model, capsys):
    pairs = write_pairs(tmp_path / "wide.parquet", rows(12, sizes=((48, 96), (40, 100))))
    folder = make(data__pairs=str(pairs), data__aspect="buckets", data__resolution=64, data__validation="")
    line = next(line for line in capsys.readouterr().out.splitlines() if "latents" in line)
    said = re.search(r"([\d.]+) kB +3 files: 12 pairs; of 12 looked at, (\d+)x(\d+) 100%", line)
    assert said is not None, line
    height, width = int(said[2]), int(said[3])
    assert height < width
    taken = sum(path.stat().st_size for path in (folder / "train/latents").glob("*.safetensors"))
    assert abs(float(said[1]) * 1e3 - taken) < 0.01 * taken + 3 * 1500
    values = 12 * 2 * 2 * 4 * (height // 8) * (width // 8) * 4
    assert values < taken < values + 12 * cache_need.PLACES + 3 * 2000


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_encoded(make, monkeypatch, tmp_path):
    monkeypatch.setattr(cache_need, "_free", lambda folder: 20_000)
    with pytest.raises(UserError, match="does not fit on its disk") as caught:
        make()
    assert "20.0 kB are free" in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_what_is_there_already_needs_no_room(make, monkeypatch):
    folder = make("cache", EncodeOptions(shard=(0, 2)))
    there = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    whole = sum(path.stat().st_size for path in make("whole").rglob("*.safetensors"))
    headers = 1500 * len(list(folder.rglob("*.safetensors")))
    monkeypatch.setattr(cache_need, "_free", lambda folder: whole - there + headers)
    make()
    parts = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("manifest.json")}
    assert parts == {"train/latents", "train/text-shared", "validation/latents", "validation/text-shared"}


@pytest.mark.parametrize("without_manifest", [False, True])
@pytest.mark.parametrize(
    "name", ["train/latents/00002.safetensors", "train/text-shared/index.safetensors",
             "validation/text-shared/00001.safetensors"]
)  # fmt: skip
def test_a_file_that_was_removed_is_made_again_and_no_other(make, name, without_manifest):
    folder = make()
    whole = contents(folder)
    (folder / name).unlink()
    if without_manifest:
        (folder / name).parent.joinpath("manifest.json").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("0*.safetensors")}
    assert make() == folder
    assert contents(folder) == whole
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_file_that_was_cut_off_is_named_by_encode_and_by_train(make, tmp_path, model):
    folder = make()
    path = folder / "train/latents/00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    tree = config(
        model, tmp_path / "pairs.parquet", tmp_path / "run",
        data__cache_dir=str(folder), data__max_bad_share=0.1,
    )  # fmt: skip
    for command in (make, lambda: train(load_train_config(write_config(tmp_path / "t.toml", tree), []))):
        with pytest.raises(UserError, match="is damaged") as caught:
            command()
        assert str(path) in str(caught.value)
        assert "remove that file" in caught.value.fix


@pytest.mark.parametrize(("options", "text"), [
    (EncodeOptions(shard=(2, 2)), "--shard 2/2 is none"),
    (EncodeOptions(engine="spark"), "unknown engine 'spark'"),
])  # fmt: skip
def test_a_users_mistake(make, options, text):
    with pytest.raises(UserError, match=text):
        make("cache", options)
