"""What a run meets outside itself: workers that are killed, disks that refuse, damaged files, a requeued
job."""

from __future__ import annotations

import builtins
import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from diffpref.families.miniature import stable_diffusion
from tests.forked import start
from tests.miniatures import config, diffpref_here, metrics, rows, write_config, write_pairs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    stable_diffusion(folder / "model")
    write_pairs(folder / "pairs.parquet", rows(24))
    return folder


def write(world, folder, **changes):
    """The config of a run in `folder`, as a file beside it."""
    tree = config(world / "model", world / "pairs.parquet", folder, **changes)
    return write_config(folder.with_suffix(".toml"), tree)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run of four steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, printed = diffpref_here("train", write(world, folder, train__steps=4, checkpoint__every=1))
    assert code == 0, printed
    return folder


def same_model(folder, other):
    ours, theirs = (
        load_file(each / "model/unet/diffusion_pytorch_model.safetensors") for each in (folder, other)
    )
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def one_error(printed):
    return printed.count("error:") == 1 and "Traceback" not in printed


class Killer(threading.Thread):
    """Kills the first worker process that this one starts."""

    def __init__(self):
        super().__init__(daemon=True)
        self.killed = False

    def run(self):
        before, end = set(multiprocessing.active_children()), time.monotonic() + 60
        while not self.killed and time.monotonic() < end:
            for child in set(multiprocessing.active_children()) - before:
                os.kill(child.pid, signal.SIGKILL)
                self.killed = True
                return
            time.sleep(0.01)


def test_a_killed_worker_of_train_is_one_message_and_costs_nothing(world, tmp_path):
    path = write(world, tmp_path / "run", data__workers=1, train__steps=2)
    killer = Killer()
    killer.start()
    code, printed = diffpref_here("train", path)
    assert killer.killed
    assert code == 2, printed
    assert one_error(printed)
    assert "a worker process died" in printed
    assert "fewer data.workers" in printed
    assert (tmp_path / "run" / "cache").is_dir(), "what is encoded stays"
    code, printed = diffpref_here("train", path, "--data.workers", "0")
    assert code == 0, printed


def test_a_killed_worker_of_convert_is_one_message(world, tmp_path):
    killer = Killer()
    killer.start()
    arguments = ("convert", world / "pairs.parquet", "--out", tmp_path / "out")
    code, printed = diffpref_here(*arguments, "--workers", "1")
    assert killer.killed
    assert code == 2, printed
    assert one_error(printed)
    assert "a worker process died" in printed
    assert "fewer --workers" in printed
    code, printed = diffpref_here(*arguments)
    assert code == 0, printed


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("name", ["config.toml", "manifest.json", "metrics.jsonl", "step-2", "model"])
def test_a_disk_that_refuses_at_any_file_is_one_message_and_the_run_goes_on(
    world, whole, tmp_path, monkeypatch, name, number
):
    """Each name is that of the first file which cannot be put into its place."""
    path = write(world, tmp_path / "run", train__steps=4, checkpoint__every=1)
    with monkeypatch.context() as disk:
        for function in ("replace", "rename"):
            real = getattr(os, function)

            def refusing(source, target, *, real=real, **options):
                if os.fspath(target) == str(tmp_path / "run" / name) or str(target).endswith(f"/{name}"):
                    raise OSError(number, os.strerror(number))
                return real(source, target, **options)

            disk.setattr(os, function, refusing)
        code, printed = diffpref_here("train", path)
    assert code == 2, printed
    assert one_error(printed)
    assert os.strerror(number) in printed
    code, printed = diffpref_here("train", path)
    assert code == 0, printed
    assert same_model(tmp_path / "run", whole)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_a_row_in_mid_run_is_one_message_and_the_run_goes_on(
    world, whole, tmp_path, monkeypatch, number
):
    path = write(world, tmp_path / "run", train__steps=4, checkpoint__every=1, log__every=1)
    real, appended = builtins.open, []

    def refusing(file, mode="r", *arguments, **options):
        if str(file).endswith("metrics.jsonl") and mode == "a":
            appended.append(file)
            if len(appended) > 5:  # a row and its flush at each step
                raise OSError(number, os.strerror(number), str(file))
        return real(file, mode, *arguments, **options)

    with monkeypatch.context() as disk:
        disk.setattr(builtins, "open", refusing)
        code, printed = diffpref_here("train", path)
    assert code == 2, printed
    assert one_error(printed)
    assert (tmp_path / "run" / "checkpoints").is_dir()
    code, printed = diffpref_here("train", path)
    assert code == 0, printed
    assert "continuing" in printed
    assert same_model(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "key", ["output", "data.pairs", "data.validation", "data.cache_dir", "model.base", "objective.name"]
)
@pytest.mark.parametrize("value", ["a" * 5000, "a/" * 2500, "~nobody-of-this-name/x"])
def test_names_of_any_length_are_one_message(world, tmp_path, monkeypatch, key, value):
    monkeypatch.chdir(tmp_path)
    path = write(world, tmp_path / "run", train__steps=1)
    code, printed = diffpref_here("train", path, f"--{key}", value)
    if code == 0:  # a folder may be called ~nobody
        assert value.startswith("~")
        return
    assert code == 2
    assert one_error(printed)
    assert not (tmp_path / "run").exists()


def test_a_requeued_job_loses_nothing_of_the_first_whenever_it_starts(world, whole, tmp_path):
    """Every checkpoint replaces the one before it; the second job comes again until it may begin."""
    path = write(world, tmp_path / "run", train__steps=4, checkpoint__every=1, checkpoint__keep=1)
    first = start(tmp_path / "first", "train", path)
    refused = 0
    while True:
        code, printed = diffpref_here("train", path)
        if code == 0:
            break
        assert "another process is training" in printed, printed
        refused += 1
    first.wait()
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-4"]
    assert same_model(tmp_path / "run", whole)
    code, printed = diffpref_here("train", path)
    assert "is finished: 4 steps" in printed


@pytest.mark.parametrize("key", ["output", "data.cache_dir", "data.pairs", "model.base"])
def test_encode_tells_names_of_any_length_too(world, tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    path = write(world, tmp_path / "run")
    code, printed = diffpref_here("encode", path, f"--{key}", "a" * 5000)
    assert code == 2, printed
    assert one_error(printed)


def test_the_next_start_removes_temporary_files_of_the_dead_and_none_of_the_living(world, tmp_path):
    """Also in folders that are finished, where the next start writes nothing."""
    train = ("train", write(world, tmp_path / "run", train__steps=1))
    convert = ("convert", world / "pairs.parquet", "--out", tmp_path / "pairs")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    draw = ("generate", "--model", world / "model", "--suite", tmp_path / "prompts.txt", "--out")
    draw = (*draw, tmp_path / "images", "--limit", 1, "--steps", 2, "--guidance", 1, "--size", 32)
    for command, places in (
        (train, ["run/.manifest.json"]),
        (convert, ["pairs/.settings.json", "pairs/.report.json"]),
        (draw, ["images/.manifest.jsonl", "images/images/.00000-0.png"]),
    ):
        for finished in (False, True):
            code, printed = diffpref_here(*command)
            assert code == 0, printed
            if not finished:
                dead = [tmp_path / f"{place}.abcd1234.tmp" for place in places]
                living = [tmp_path / f"{place}.efgh5678.tmp" for place in places]
                for path in (*dead, *living):
                    path.touch()
                held = [os.open(path, os.O_RDWR) for path in living]
                for descriptor in held:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert not any(path.exists() for path in dead), command
        assert all(path.exists() for path in living), command
        for descriptor in held:
            os.close(descriptor)
