"""Checkpoints: whole or absent, whatever moment a kill or a full disk chooses."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from diffpref.errors import UserError
from diffpref.training.checkpoint import Checkpoints


def tensors(value: float, size: int = 64):
    return {"weights": {"w": torch.full((size,), value)}, "optimizer": {"exp_avg/w": torch.zeros(size)}}


def test_saved_values_come_back(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, tensors(1.5), {"step": 3, "note": "x"})
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 3
    assert latest.state() == {"step": 3, "note": "x"}
    assert torch.equal(latest.tensors("weights")["w"], torch.full((64,), 1.5))
    assert not latest.has("average")


def test_the_newest_is_numerically_newest_and_old_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (8, 9, 10):
        checkpoints.save(step, tensors(step), {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-9"]
    assert checkpoints.latest().step == 10


@pytest.mark.parametrize("damage", ["missing", "short", "changed", "no manifest", "torn manifest"])
def test_a_broken_checkpoint_is_passed_over(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1), {"step": 1})
    newest = checkpoints.save(2, tensors(2), {"step": 2}).path
    weights, manifest = newest / "weights.safetensors", newest / "manifest.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "short":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:30])
    assert checkpoints.latest().step == 1


def test_nothing_there(tmp_path):
    assert Checkpoints(tmp_path / "absent").latest() is None


def test_clean_removes_what_a_kill_left_and_only_that(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1), {"step": 1})
    (tmp_path / ".staged-2").mkdir()
    (tmp_path / ".removed-step-0").mkdir()
    (tmp_path / "step-0").mkdir()  # no kill of ours leaves this
    (tmp_path / "notes").mkdir()
    checkpoints.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-0", "step-1"]


def test_a_save_removes_no_checkpoint_that_is_newer(tmp_path):
    """As after a start from an older one: what is newer was somebody's progress."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(9, tensors(9), {"step": 9})
    checkpoints.save(3, tensors(3), {"step": 3})
    checkpoints.save(4, tensors(4), {"step": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-4", "step-9"]


def test_a_save_over_a_damaged_one_of_the_same_step_sets_that_aside(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for value in (1, 2, 3):
        checkpoints.save(5, tensors(value), {"step": 5})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "damaged-step-5",
        "damaged-step-5-2",
        "step-5",
    ]
    assert torch.equal(checkpoints.latest().tensors("weights")["w"], torch.full((64,), 3.0))


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_speaks_of_an_earlier_checkpoint_only_where_there_is_one(tmp_path, full_disk, earlier):
    checkpoints = Checkpoints(tmp_path)
    if earlier:
        checkpoints.save(1, tensors(1), {"step": 1})
    with pytest.raises(UserError) as caught:
        checkpoints.save(2, tensors(2, size=100_000), {"step": 2})
    assert ("step-1 is intact" if earlier else "there is no earlier checkpoint") in caught.value.why


def _in_child(action) -> int:
    """Run in a forked process; returns the number of the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at_call(monkeypatched: int) -> None:
    """Make the n-th call of a file operation kill this process, as `kill -9` at that moment would."""
    count = 0

    def deadly(function):
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == monkeypatched:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    for name in ("replace", "rename", "unlink", "rmdir", "fsync", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))


def test_a_kill_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    survived_whole_save = False
    moments = 0
    for moment in range(1, 200):
        folder = tmp_path / str(moment)
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.save(1, tensors(1), {"step": 1})

        def save(moment: int = moment, checkpoints: Checkpoints = checkpoints) -> None:
            _kill_at_call(moment)
            checkpoints.save(2, tensors(2), {"step": 2})

        ended = _in_child(save)
        latest = checkpoints.latest()
        assert latest is not None, f"nothing to resume from after a kill at operation {moment}"
        assert torch.equal(latest.tensors("weights")["w"], torch.full((64,), float(latest.step)))
        checkpoints.clean()
        checkpoints.save(3, tensors(3), {"step": 3})  # the next attempt is not in the way of the leftovers
        assert checkpoints.latest().step == 3
        if ended == 0:
            survived_whole_save = True
            break
        moments += 1
    assert survived_whole_save
    assert moments >= 10


@pytest.fixture
def full_disk():
    """Files of this process may not grow beyond 64 KiB: the writes fail as they do on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_is_told_and_the_previous_checkpoint_survives(tmp_path, full_disk):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, tensors(1), {"step": 1})
    with pytest.raises(UserError, match="no room on the disk"):
        checkpoints.save(2, tensors(2, size=100_000), {"step": 2})
    assert [path.name for path in Path(tmp_path).iterdir()] == ["step-1"]
    assert checkpoints.latest().step == 1
