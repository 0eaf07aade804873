"""Paths, hashes and writes that never leave half a file."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from diffpref import paths
from diffpref.errors import UserError


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_resolve_tells_shipped_assets_existing_paths_and_hub_ids_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert paths.resolve("tiny:pairs/train.parquet") == paths.PACKAGE / "tiny/assets/pairs/train.parquet"
    assert paths.resolve(str(tmp_path / "model")) == tmp_path / "model"
    assert paths.resolve("~/model") == tmp_path / "model"
    assert paths.resolve("org/name") == "org/name"
    assert paths.resolve("") == ""


@pytest.mark.parametrize(
    ("name", "why", "fix"),
    [
        ("trian.parquet", "holds nothing called 'trian.parquet'", "train.parquet"),
        ("deep/er/file", "deep does not exist", "give the path"),
        ("", "the name is empty", "give the path"),
    ],
)
def test_a_missing_file_is_explained_with_the_nearest_neighbour(tmp_path, monkeypatch, name, why, fix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.parquet").touch()
    with pytest.raises(UserError) as caught:
        paths.resolve_existing(name, "pairs")
    assert caught.value.what == f"pairs not found: {name!r}"
    assert why in caught.value.why
    assert fix in caught.value.fix


def test_a_missing_shipped_asset_is_the_users_mistake_too():
    with pytest.raises(UserError, match="model not found: 'tiny:modle'"):
        paths.resolve_existing("tiny:modle", "model")


def test_hashes_are_sha256(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert paths.sha256_file(tmp_path / "abc") == expected
    # printf '{"a":[1,2],"b":"é"}' | sha256sum
    expected = "d902c5ef87c42c33059e8d7b7aa30485809a5c0ff84b8d0d285616d5b03f23ea"
    assert paths.fingerprint({"b": "é", "a": (1, 2)}) == expected
    assert paths.fingerprint({"a": 1}) != paths.fingerprint({"a": 2})
    with pytest.raises(ValueError):
        paths.fingerprint({"a": float("nan")})


def test_a_write_replaces_the_file_and_keeps_its_permissions(tmp_path: Path):
    target = tmp_path / "new" / "folder" / "file.json"
    paths.atomic_write_text(target, "é")
    assert target.read_bytes() == "é".encode()
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    target.chmod(0o640)
    paths.atomic_write_bytes(target, b"second")
    assert target.read_bytes() == b"second"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names_in(target.parent) == ["file.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path):
    """A file size limit of the process makes the write itself fail half-way, as a full disk does."""
    import resource
    import signal

    target = tmp_path / "file"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            paths.atomic_write_bytes(target, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert target.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_recipes_and_suites_are_found_in_the_checkout():
    assert (paths.share_dir("configs") / "train").is_dir()
    assert paths.share_dir("eval").is_dir()


HELD = """
import os, sys, time
from diffpref import paths
os.replace = lambda *names: (print("writing", flush=True), time.sleep(60))
paths.atomic_write_text(sys.argv[1], "x")
"""


def test_what_a_killed_writer_left_goes_and_what_a_live_one_writes_stays(tmp_path: Path):
    def begun_write(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HELD, str(tmp_path / name)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        return process

    dead, alive = begun_write("settings.json"), begun_write("manifest.jsonl")
    try:
        dead.kill()
        dead.wait()
        others = [".settings.json.notes.tmp", ".hidden", "a.abcdefgh.tmp"]  # of somebody else
        for name in others:
            (tmp_path / name).touch()
        (tmp_path / ".link.abcdefgh.tmp").symlink_to(tmp_path / ".hidden")
        os.mkfifo(tmp_path / ".pipe.abcdefgh.tmp")
        assert len(list(tmp_path.glob(".settings.json.????????.tmp"))) == 1
        paths.forget_tidied()
        paths.atomic_write_text(tmp_path / "report.json", "{}")
        assert not list(tmp_path.glob(".settings.json.????????.tmp"))
        assert len(list(tmp_path.glob(".manifest.jsonl.????????.tmp"))) == 1
        assert {*others, "report.json", ".pipe.abcdefgh.tmp", ".link.abcdefgh.tmp"} <= set(names_in(tmp_path))
    finally:
        alive.kill()
        alive.wait()


def test_a_writer_whose_temporary_file_is_tidied_before_it_is_locked_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, seen = paths.fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not seen:
            seen.extend(names_in(tmp_path))
            (tmp_path / seen[0]).unlink()
        real(descriptor, how)

    paths.forget_tidied()
    monkeypatch.setattr(paths.fcntl, "flock", late)
    paths.atomic_write_text(tmp_path / "file", "whole")
    assert len(seen) == 1
    assert names_in(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "whole"


def test_a_folder_is_listed_once_in_a_command_not_for_each_write(tmp_path: Path, monkeypatch):
    listed: list[object] = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: (listed.append(folder), real(folder))[1])
    for command in range(2):
        paths.forget_tidied()
        for number in range(5):
            paths.atomic_write_text(tmp_path / f"{command}-{number}", "")
    assert len(listed) == 2


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 2500, "~nobody-of-this-name/x", "a\0b", "é" * 200])
def test_names_that_no_file_system_takes_are_not_found(name: str):
    assert paths.resolve(name) == name
    with pytest.raises(UserError, match="pairs not found") as caught:
        paths.resolve_existing(name, "pairs")
    assert len(str(caught.value)) < 1000
