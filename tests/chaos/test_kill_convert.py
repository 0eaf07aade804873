"""`kill -9` of `diffpref convert` at random moments: the bytes are those of a conversion never killed, and a
finished part is never made again."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

KILLS = 10
ROWS = 240
RAY = ["--engine", "ray", "--workers", "2"]


def write_source(folder: Path) -> Path:
    """An HPDv2 train.json of rows with noisy images, which take a while to decode; some rows are bad."""
    folder.mkdir()
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, (512, 512, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, "PNG", compress_level=1)
        for copy in range(ROWS // 6 + 1):  # a file of its own each time: none is decoded from memory
            name = folder / f"{number}-{copy}.png"
            name.write_bytes(stream.getvalue()[:-12] + chunk(copy) + stream.getvalue()[-12:])
    entries = [
        {
            "prompt": f"prompt {row % 50}",
            "file_path": [f"{row % 6}-{row // 6}.png", f"{6 + row % 6}-{row // 6}.png"],
            "human_preference": [row % 2, 1 - row % 2] if row % 17 else [1, 1],
        }
        for row in range(ROWS)
    ]
    entries[100]["file_path"][1] = "missing.png"
    (folder / "train.json").write_text(json.dumps(entries))
    return folder / "train.json"


def chunk(number: int) -> bytes:
    """A private PNG chunk, so that files of equal pixels differ."""
    import zlib

    body = b"prVt" + number.to_bytes(4, "big")
    return (4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def start(source: Path, out: Path, *options: str, rows: int = 6) -> subprocess.Popen[bytes]:
    """rows: of a part."""
    command = [sys.executable, "-m", "diffpref", "convert", str(source), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--rows-per-file", str(rows), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[bytes]) -> None:
    assert process.wait(300) == 0, process.stderr and process.stderr.read()


def parts(out: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("part-*.parquet")}


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.parametrize(
    ("options", "rows", "most"),
    [([], 6, 3), pytest.param(RAY, 2, 6, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
    ids=["one", "ray"],
)
def test_killed_ten_times_equals_never_killed(tmp_path, options, rows, most):
    """Of a run under Ray the command is killed; the cluster's own processes notice that."""
    source = write_source(tmp_path / "source")
    finish(start(source, tmp_path / "whole", rows=rows))
    moments, out = random.Random(7), tmp_path / "killed"
    kills, left_staged, before = 0, 0, {}
    while kills < KILLS:
        process = start(source, out, *options, rows=rows)
        goal = len(parts(out)) + moments.randint(0, most)
        while process.poll() is None and (len(parts(out)) < goal or not (out / "settings.json").exists()):
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.1))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        left_staged += any(path.name.endswith(".tmp") for path in out.iterdir())
        now = parts(out)
        assert before.items() <= now.items(), "a finished part was made again"
        before = now
    assert kills >= 8, f"the conversion ended after {kills} kills: make it longer"
    assert left_staged, "no kill hit a part that was being written"
    finish(start(source, out, *options, rows=rows))
    assert before.items() <= parts(out).items()
    assert contents(out) == contents(tmp_path / "whole")
    report = json.loads((out / "report.json").read_text())
    assert (report["rows"], report["kept"]) == (
        ROWS,
        ROWS - 15 - 1,
    )  # every 17th of 240, and the missing file
    assert report["dropped"]["bad_label"] == 15


def test_killed_with_workers_leaves_no_process_behind(tmp_path):
    source = write_source(tmp_path / "source")
    process = start(source, tmp_path / "out", "--workers", "2")
    while process.poll() is None and not parts(tmp_path / "out"):
        time.sleep(0.01)
    assert process.poll() is None
    group = os.getpgid(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert members(group) == []


def members(group: int) -> list[int]:
    """Living processes of a process group (zombies, which nobody may reap here, are dead)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found
