"""`diffpref convert --engine ray`: the bytes of the local engine, from a source that is read in order."""

from __future__ import annotations

import os

import pytest

from diffpref.cli import main
from tests.convert_files import diffpref, error, files, jsonl, pair, run, write_images


@pytest.mark.usefixtures("ray_cluster")
def test_ray_converts_to_the_same_bytes(tmp_path, monkeypatch):
    write_images(tmp_path / "in")
    entries = [pair(caption=f"p {n}", label_0=n % 2) for n in range(23)]
    entries[5]["image_0"], entries[6]["label_0"] = "missing.png", 0.5
    jsonl(tmp_path / "in" / "list.jsonl", entries)
    monkeypatch.chdir(tmp_path)  # a relative path must mean the same to the workers
    options = ["--rows-per-file", "4", "--shard", "1/2"]
    assert main(["convert", "in/list.jsonl", "--out", "a", *options]) == 0
    assert (
        main(["convert", "in/list.jsonl", "--out", "b", *options, "--engine", "ray", "--workers", "2"]) == 0
    )
    assert sorted(files(tmp_path / "a")) == [
        "part-00001.parquet", "part-00003.parquet", "part-00005.parquet", "settings.json",
    ]  # fmt: skip
    assert files(tmp_path / "a") == files(tmp_path / "b")
    run(tmp_path / "in/list.jsonl", tmp_path / "a", rows_per_file=4)
    run(tmp_path / "in/list.jsonl", tmp_path / "b", rows_per_file=4, engine="ray", workers=2)
    assert "manifest.json" in files(tmp_path / "a")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_an_unknown_engine_is_refused(tmp_path):
    assert "unknown engine 'dask'" in error(tmp_path, tmp_path / "out", engine="dask")


def test_a_cluster_that_is_not_there_is_named_at_once(tmp_path):
    jsonl(write_images(tmp_path / "in") / "list.jsonl", [pair()])
    done = diffpref(
        tmp_path / "in/list.jsonl", "--out", tmp_path / "out", "--engine", "ray",
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: no Ray cluster at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
