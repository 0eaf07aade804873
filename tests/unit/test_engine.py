"""Units made by one process, several, and Ray: the same files, the same errors, none left behind."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time

import pytest

from diffpref.engine import Engine, ahead, run_units
from diffpref.errors import UserError
from tests.engine_jobs import Squares

pytestmark = pytest.mark.usefixtures("ray_cluster")
ENGINES = {"here": Engine(), "processes": Engine(workers=2), "ray": Engine("ray", workers=2)}


@pytest.mark.parametrize("name", ENGINES)
def test_every_unit_is_made_once_by_workers_that_start_once(tmp_path, name):
    job, rows = Squares(tmp_path), []
    run_units(job, [3, 1, 4, 8, 5], rows.append, ENGINES[name])
    assert job.made() == {f"unit-{n}": str(n * n) for n in (3, 1, 4, 8, 5)}
    assert sum(rows) == 5 * 7
    started = len(list(tmp_path.glob("started-*")))
    assert started == (1 if name == "here" else started) <= 2
    assert (tmp_path / f"started-{os.getpid()}").exists() == (name == "here")


@pytest.mark.parametrize("name", ENGINES)
def test_a_mistake_of_the_user_arrives_as_it_was_raised(tmp_path, name):
    with pytest.raises(UserError) as caught:
        run_units(Squares(tmp_path, fails_at=2), [1, 2], lambda rows: None, ENGINES[name])
    assert (caught.value.what, caught.value.why, caught.value.fix) == (
        "what happened", "why it did", "what to do",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["processes", "ray"])
@pytest.mark.parametrize(
    ("failure", "number", "file"),
    [
        ("full", errno.ENOSPC, "unit-2"),
        ("refused", errno.EROFS, "unit-2"),
        ("full, says safetensors", errno.ENOSPC, None),
    ],
)
def test_an_error_of_the_system_arrives_with_its_number_and_file(tmp_path, name, failure, number, file):
    with pytest.raises(OSError, match=r"space left|Read-only") as caught:
        run_units(Squares(tmp_path, 2, failure), [1, 2], lambda rows: None, ENGINES[name])
    assert (caught.value.errno, caught.value.filename) == (number, file)


@pytest.mark.parametrize(("failure", "kind"), [("reset", "ConnectionResetError"), ("end", "EOFError")])
def test_what_a_pipe_could_raise_is_a_bug_where_the_job_raises_it(tmp_path, failure, kind):
    with pytest.raises(RuntimeError, match=f"(?s)a worker process failed.*{kind}"):
        run_units(Squares(tmp_path, 2, failure), [1, 2], lambda rows: None, ENGINES["processes"])


@pytest.mark.parametrize("name", ["processes", "ray"])
def test_a_bug_in_a_worker_shows_its_traceback(tmp_path, name):
    with pytest.raises(Exception, match="ZeroDivisionError"):
        run_units(Squares(tmp_path, 2, "bug"), [2], lambda rows: None, ENGINES[name])


def test_a_worker_that_dies_is_told_and_the_others_end(tmp_path):
    job = Squares(tmp_path, 2, "killed")
    with pytest.raises(UserError, match="a worker process died"):
        run_units(job, [1, 2, 3], lambda rows: None, Engine(workers=2))
    for path in tmp_path.glob("started-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.removeprefix("started-")), 0)


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="unknown engine 'dask'"):
        run_units(Squares(tmp_path), [1], lambda rows: None, Engine("dask"))
    with pytest.raises(UserError, match="--workers must be at least 0"):
        run_units(Squares(tmp_path), [1], lambda rows: None, Engine(workers=-1))


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'diffpref\[ray\]'"):
        run_units(Squares(tmp_path), [1], lambda rows: None, ENGINES["ray"])


def test_ahead_keeps_the_order_and_makes_only_a_few_items_early():
    made = []

    def items():
        for number in range(6):
            made.append(number)
            yield number

    stream = ahead(items(), depth=1)
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2]  # one in use, one waiting, one that waits for room
    assert list(stream) == [1, 2, 3, 4, 5]


def test_ahead_raises_where_the_item_would_have_come_and_ends_its_thread():
    def items():
        yield 1
        raise UserError("damaged")

    stream = ahead(items())
    assert next(stream) == 1
    with pytest.raises(UserError, match="damaged"):
        next(stream)
    assert not any(thread.name == "ahead" for thread in threading.enumerate())


def test_ahead_closes_its_source_when_it_is_closed():
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    stream = ahead(items())
    next(stream)
    stream.close()
    assert closed.is_set()
    assert not any(thread.name == "ahead" for thread in threading.enumerate())
