"""The run folder: what a start continues from, and what it refuses rather than lose."""

from __future__ import annotations

import builtins
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from diffpref.config import load_train_config
from diffpref.errors import UserError
from diffpref.paths import share_dir
from diffpref.training.runfolder import RunFolder

INPUTS = {"pairs.train": "abc"}
STATE = {"world_size": 1, "stopped_early": False}


def run_folder(path):
    recipe = share_dir("configs") / "train" / "demo-dpo.toml"
    return RunFolder(load_train_config(recipe, [("output", str(path)), ("checkpoint.keep", "5")]))


def begun(path, steps=(10, 20)):
    """A run that was stopped after its last checkpoint."""
    folder = run_folder(path)
    folder.open()
    assert folder.find_start(1) is None
    folder.begin({"inputs": INPUTS}, None)
    for step in steps:
        folder.checkpoints.save(
            step, {"weights": {"w": torch.full((8,), float(step))}}, {"step": step} | STATE
        )
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    folder.close()
    return path


def names(path):
    return sorted(entry.name for entry in (path / "checkpoints").iterdir())


def started(path):
    """Lock, look, begin; the step it continues from."""
    folder = run_folder(path)
    folder.open()
    try:
        start = folder.find_start(1)
        folder.begin({"inputs": INPUTS}, start)
        return start.step if start else 0
    finally:
        folder.close()


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def damage(step, kind):
    weights = step / "weights.safetensors"
    if kind == "flipped byte":
        flip(weights)
    elif kind == "missing file":
        weights.unlink()
    elif kind == "short file":
        weights.write_bytes(weights.read_bytes()[:-3])
    elif kind == "no manifest":
        (step / "manifest.json").unlink()
    elif kind == "list for a manifest":
        (step / "manifest.json").write_text("[]")
    elif kind == "nested brackets":
        (step / "manifest.json").write_text("[" * 100_000)
    elif kind == "another step":
        shutil.copytree(step.with_name("step-10"), step, dirs_exist_ok=True)
    elif kind in ("link to nothing", "link to itself"):
        shutil.rmtree(step)
        step.symlink_to(step if kind == "link to itself" else step.with_name("absent"))
    elif kind == "long name":
        manifest = json.loads((step / "manifest.json").read_text())
        manifest["files"]["a" * 5000] = {"size": 1, "sha256": ""}
        (step / "manifest.json").write_text(json.dumps(manifest))
    elif kind == "a file":
        for entry in step.iterdir():
            entry.unlink()
        step.rmdir()
        step.write_text("")


FAULTS = {
    "flipped byte": "other bytes than were saved in weights.safetensors",
    "missing file": "weights.safetensors is missing",
    "short file": "weights.safetensors has 93 bytes instead of 96",
    "no manifest": "manifest.json is missing",
    "list for a manifest": "manifest.json is damaged",
    "nested brackets": "manifest.json is damaged",
    "a file": "it is no folder",
    "another step": "it was saved as step 10",
    "link to nothing": "it is no folder",
    "link to itself": "it is no folder",
    "long name": "is missing",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_damaged_newest_checkpoint_is_told_and_set_aside(tmp_path, caplog, kind):
    run = begun(tmp_path / "run")
    damage(run / "checkpoints" / "step-20", kind)
    assert started(run) == 10
    assert names(run) == ["damaged-step-20", "step-10"]
    assert "step-20 is damaged (" in caplog.text
    assert f"{FAULTS[kind]})" in caplog.text
    assert started(run) == 10  # and is not spoken of again
    assert names(run) == ["damaged-step-20", "step-10"]


def test_without_a_checkpoint_that_can_be_used_nothing_starts_and_nothing_is_touched(tmp_path):
    run = begun(tmp_path / "run")
    damage(run / "checkpoints" / "step-10", "flipped byte")
    damage(run / "checkpoints" / "step-20", "no manifest")
    with pytest.raises(UserError, match=r"no checkpoint of .* can be used") as caught:
        started(run)
    assert "step-20: manifest.json is missing" in caught.value.why
    assert "step-10: other bytes than were saved in weights.safetensors" in caught.value.why
    assert names(run) == ["step-10", "step-20"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_disk_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch, number):
    run = begun(tmp_path / "run")
    real = builtins.open

    def failing(file, *arguments, **options):
        if str(file).endswith("step-20/weights.safetensors"):
            raise OSError(number, os.strerror(number), str(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", failing)
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*step-20") as caught:
        started(run)
    assert os.strerror(number) in caught.value.why
    assert names(run) == ["step-10", "step-20"]


def test_checkpoints_without_their_config_are_not_trained_over(tmp_path):
    run = begun(tmp_path / "run")
    (run / "config.toml").unlink()
    with pytest.raises(UserError, match=r"has checkpoints and no config\.toml"):
        started(run)
    assert names(run) == ["step-10", "step-20"]


def test_a_trained_model_whose_checkpoints_are_gone_is_not_replaced(tmp_path):
    run = begun(tmp_path / "run", steps=())
    (run / "model").mkdir()
    (run / "model" / "diffpref.json").write_text('{"step": 48}')
    with pytest.raises(UserError, match="has a trained model and no checkpoint"):
        started(run)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    assert started(begun(tmp_path / "run", steps=())) == 0


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"inputs": 3}', "[" * 100_000])
def test_inputs_that_cannot_be_compared_are_not_trained_on(tmp_path, text):
    run = begun(tmp_path / "run")
    manifest = run / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    with pytest.raises(UserError, match="cannot tell whether the inputs"):
        started(run)
    assert names(run) == ["step-10", "step-20"]


def test_checkpoints_are_looked_for_under_the_lock(tmp_path):
    """A process that ends beside this one saves and rotates until the lock is this one's."""
    run = begun(tmp_path / "run")
    folder = run_folder(run)
    folder.open()
    code = (
        "import fcntl, os, sys\n"
        "try:\n    fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError:\n    print('held')"
    )
    other = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=60)
    assert other.stdout == "held\n"
    with pytest.raises(UserError, match="another process is training"):
        run_folder(run).open()
    folder.close()
    assert started(run) == 20


def test_a_folder_of_our_making_goes_when_nothing_came_of_it(tmp_path):
    folder = run_folder(tmp_path / "new")
    folder.open()
    folder.close()
    assert not (tmp_path / "new").exists()
    (tmp_path / "theirs").mkdir()
    folder = run_folder(tmp_path / "theirs")
    folder.open()
    folder.close(undo=True)
    assert (tmp_path / "theirs").is_dir()


@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_an_output_that_is_no_folder_is_one_message(tmp_path, kind):
    place = tmp_path / "run"
    place.write_text("") if kind == "file" else place.symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match="is a file" if kind == "file" else "link to nothing"):
        run_folder(place).open()


def test_a_file_in_place_of_the_checkpoints_is_one_message(tmp_path):
    run = begun(tmp_path / "run", steps=())
    (run / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints is a file"):
        started(run)


def test_the_manifest_lists_the_inputs_that_a_resume_compares(tmp_path):
    run = begun(tmp_path / "run")
    assert json.loads((run / "manifest.json").read_text())["inputs"] == INPUTS
    folder = run_folder(run)
    folder.open()
    start = folder.find_start(1)
    with pytest.raises(UserError, match=r"pairs\.train"):
        folder.begin({"inputs": {"pairs.train": "other"}}, start)
    folder.close()


def killed_at(moment, action):
    """Whether a SIGKILL at the file operation of that number, from 1, ended the action in a process of its
    own."""
    child = os.fork()
    if child == 0:
        count = 0

        def deadly(function):
            def wrapped(*arguments, **options):
                nonlocal count
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return wrapped

        for name in ("replace", "rename", "unlink", "rmdir", "fsync", "mkdir"):
            setattr(os, name, deadly(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_kill_at_any_file_operation_loses_neither_a_whole_nor_a_damaged_checkpoint(tmp_path):
    """Of a start that passes over a damaged checkpoint, and of the save and the rotation that follow."""
    whole = begun(tmp_path / "whole")
    damage(whole / "checkpoints" / "step-20", "flipped byte")
    damaged = (whole / "checkpoints" / "step-20" / "weights.safetensors").read_bytes()
    moment, killed = 0, True
    while killed:
        moment += 1
        run = tmp_path / str(moment)
        shutil.copytree(whole, run)

        def go_on(run=run):
            folder = run_folder(run)
            folder.checkpoints.keep = 1
            folder.open()
            folder.begin({"inputs": INPUTS}, folder.find_start(1))
            tensors = {"weights": {"w": torch.full((8,), 15.0)}}
            folder.checkpoints.save(15, tensors, {"step": 15} | STATE)

        killed = killed_at(moment, go_on)
        kept = [path.read_bytes() for path in run.glob("checkpoints/*step-20*/weights.safetensors")]
        assert kept == [damaged], f"a kill at operation {moment} lost the damaged one"
        found = started(run)
        assert found == (10 if killed and found == 10 else 15), moment
        weights = run_folder(run).checkpoints.latest().tensors("weights")["w"]
        assert torch.equal(weights, torch.full((8,), float(found)))
        assert not [path.name for path in run.rglob(".*")], "the next start leaves nothing of a dead one"
    assert moment > 20


def test_a_checkpoint_that_is_a_link_is_used_and_rotated_without_what_it_names(tmp_path):
    run = begun(tmp_path / "run")
    kept = tmp_path / "kept"
    (run / "checkpoints" / "step-20").rename(kept)
    (run / "checkpoints" / "step-20").symlink_to(kept)
    before = sorted(path.name for path in kept.iterdir())
    folder = run_folder(run)
    folder.checkpoints.keep = 1
    folder.open()
    assert folder.find_start(1).step == 20
    folder.checkpoints.save(30, {"weights": {"w": torch.zeros(8)}}, {"step": 30} | STATE)
    folder.close()
    assert os.listdir(run / "checkpoints") == ["step-30"]
    assert sorted(path.name for path in kept.iterdir()) == before


def test_a_file_system_without_locks_is_told_and_trained_on(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    run = begun(tmp_path / "run")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert started(run) == 20
    assert "cannot be locked" in caplog.text


def test_the_lock_of_a_dead_process_holds_nobody_up(tmp_path):
    run = begun(tmp_path / "run")
    code = "import sys, os, fcntl, time\nfcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
    code += "print('held', flush=True)\ntime.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is training"):
        run_folder(run).open()
    other.kill()
    other.wait()
    assert started(run) == 20


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 2500, "a\0b"], ids=["name", "path", "null"])
def test_an_output_that_no_file_system_takes_is_one_message(tmp_path, name):
    with pytest.raises(UserError, match=r"cannot use the output folder|null character") as caught:
        run_folder(tmp_path / name).open()
    assert len(str(caught.value)) < 1000
    assert not list(tmp_path.iterdir())
