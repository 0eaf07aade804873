"""The GPU bench, on a CPU with miniatures: its rows, its FLOPs, its table, and what it does with bad luck."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import cuda_memory
import cuda_rows
import cuda_speed
import full_size_step
from counting import Flops, flops_of
from cuda_rows import BF16, CACHED, COMPILED, LAST, LORA, MAPO, ROWS, Row
from published import Published
from release import Release

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--size", "miniature", "--row-seconds", "0"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published("sd15", False, CPU, tmp_path_factory.mktemp("sd15"))


def test_published_flops_at_full_size(tmp_path: Path) -> None:
    """0.803 TF for the UNet, 1.117 for the VAE's encoder, 0.013 for the text: counted elsewhere too."""
    flops = Published("sd15", True, CPU, tmp_path).flops()
    assert flops.unet / 1e12 == pytest.approx(0.803, abs=5e-4)
    assert flops.vae / 1e12 == pytest.approx(1.117, abs=5e-4)
    assert flops.text / 1e12 == pytest.approx(0.0133, abs=5e-5)


@pytest.mark.parametrize(
    ("switches", "forwards"), [({}, 8), (MAPO, 6), (CACHED, 6)], ids=["dpo", "mapo", "cached"]
)
def test_a_real_step_costs_what_its_row_says(
    sd15: Published, tmp_path: Path, switches: dict[str, Any], forwards: int
) -> None:
    row, flops = Row("sd15", 2, switches), sd15.flops()
    assert getattr(flops, row.flops) == forwards * flops.unet
    # somewhat less in a miniature: its text, as large as its latents, needs no gradients
    assert _counted(sd15, switches, tmp_path) == pytest.approx(forwards * flops.unet, rel=0.06)


def test_lora_has_no_gradients_of_frozen_weights(sd15: Published, tmp_path: Path) -> None:
    flops = sd15.flops()
    assert getattr(flops, Row("sd15", 2, LORA).flops) == 6 * flops.unet
    thin = LORA | {"adapter.rank": 1}  # miniatures are narrow: rank 16 would be much beside them
    assert _counted(sd15, thin, tmp_path) == pytest.approx(6 * flops.unet, rel=0.06)


def _counted(model: Published, switches: dict[str, Any], work: Path) -> float:
    """FLOPs per pair of a step of two."""
    cache = model.cache(work / "noise", 2)
    stepper = model.stepper({**switches, "train.batch_size": 2}, cache, work)
    return flops_of(lambda: stepper.take(1)) / 2


def test_the_usual_order_costs_vae_and_text_as_well(sd15: Published) -> None:
    loop, flops = Release(sd15, batch=4, micro=2, checkpointing=False), sd15.flops()
    assert Row("sd15", 1).flops == "usual"
    assert flops_of(lambda: loop.step(0)) / 4 == pytest.approx(flops.usual, rel=0.06)
    before = [value.clone() for value in loop._unet.parameters()]
    loop.step(1)
    assert any(not torch.equal(old, new) for old, new in zip(before, loop._unet.parameters(), strict=True))
    assert 0 < loop.sums[0] < 100  # its half-precision reference leaves a margin of noise
    assert loop.sums[1] == pytest.approx(loop.sums[2], rel=0.02)  # policy and reference


def test_compilation_and_format_reach_the_stepper(sd15: Published, tmp_path: Path) -> None:
    cache = sd15.cache(tmp_path / "noise", 4)
    stepper = sd15.stepper({**LAST, "train.batch_size": 4, "train.micro_batch": 2}, cache, tmp_path)
    assert stepper.micro_batch == 2
    assert stepper.config.train.channels_last  # on CUDA only the weights follow
    assert stepper.accelerator.mixed_precision == "bf16"
    config = sd15.config(COMPILED)
    assert config.train.compile
    assert not sd15.config(BF16).train.channels_last


def test_rows_are_different_and_fit_their_batches() -> None:
    assert all(row not in ROWS[:number] for number, row in enumerate(ROWS))
    assert all(cuda_rows.BATCH[row.model] % row.micro == 0 for row in ROWS)
    for model in cuda_rows.TITLES:
        kinds = {row.what for row in ROWS if row.model == model}
        wanted = ("DPO full", "DPO full, cached reference", "MaPO full", "DPO LoRA")
        assert kinds == {"usual order, DPO", *(f"diffpref, {kind}" for kind in wanted)}
    steps = [row.how for row in ROWS if row.model == "sd15" and row.what == "diffpref, DPO full"]
    assert {"fp32", "bf16", "bf16, channels_last", "bf16, channels_last, compile"} <= set(steps)


def test_every_row_runs_or_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda_speed.main([*SMALL, "--models", "sd15", "sdxl", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "table.json").read_text())
    rows = cuda_speed.chosen(Namespace(models=["sd15", "sdxl"], size="miniature", rows=None))
    key = ("model", "what", "how", "micro_batch")
    assert [tuple(one[name] for name in key) for one in written["rows"]] == [
        (row.model, row.what, row.how, row.micro) for row in rows
    ]
    for one, row in zip(written["rows"], rows, strict=True):
        if row.for_cuda:
            assert one["note"] == f"not run: {row.for_cuda} is for CUDA"
        else:
            assert one["pairs_per_second"][0] > 0
            assert one["peak_memory_gb"] is None
    table = (tmp_path / "table.md").read_text()
    assert table == capsys.readouterr().out
    assert sum(line.startswith(("| SD1.5 |", "| SDXL |")) for line in table.splitlines()) == len(rows)
    assert "goal" not in table  # a miniature has none


class Scripted:
    """A contender that needs more memory than there is, fails, or takes its time."""

    def __init__(self, micro: int, fits: int = 99, error: Exception | None = None, sleep: float = 0) -> None:
        self._micro, self._fits, self._error, self._sleep = micro, fits, error, sleep

    def warm(self) -> None:
        if self._micro > self._fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self._error is not None:
            raise self._error
        time.sleep(self._sleep)

    def step(self, number: int) -> None:
        time.sleep(0.001)


def _bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, minutes: float = 1, **script: Any) -> Any:
    flops = Flops(unet=1e12, vae=0.0, text=0.0)
    monkeypatch.setattr(cuda_speed.Bench, "_model", lambda self, name: (None, [0] * 8, flops))
    monkeypatch.setattr(
        cuda_speed.Bench, "_contender", lambda self, row, model, cache: Scripted(row.micro, **script)
    )
    values = Namespace(size="full", device="cpu", row_seconds=0.01)
    return cuda_speed.Bench(values, tmp_path, time.monotonic() + 60 * minutes)


def test_rows_larger_than_the_card_are_not_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the estimate: two pairs of SDXL need an H200; one fits an H100, and stands in for two there."""
    monkeypatch.setattr(cuda_speed, "gib_of", lambda device: 79.2)
    bench = _bench(monkeypatch, tmp_path)
    known = cuda_memory.figures()
    two, one, eight = (Row.named(f"sdxl-{name}") for name in ("2-bf16", "1-bf16", "8-bf16-checkpointing"))
    assert known[one.name] < 0.9 * 79.2 < known[two.name]
    found = bench.measure(two)
    assert found["note"] == f"not run: needs {known[two.name]} GiB by estimate, the card has 79"
    assert found["estimated_gb"] == known[two.name]
    assert "note" not in bench.measure(one)
    assert cuda_memory.with_smaller([two, eight], 79.2, known) == [two, one, eight]
    assert cuda_memory.with_smaller([two, eight, one], 79.2, known) == [two, eight, one]
    assert cuda_memory.with_smaller([two, eight], 139.7, known) == [two, eight]
    monkeypatch.setattr(cuda_speed, "gib_of", lambda device: 139.7)
    assert "note" not in _bench(monkeypatch, tmp_path).measure(two)


def test_a_row_out_of_memory_is_told_beside_its_estimate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = _bench(monkeypatch, tmp_path, fits=4)
    gib = cuda_memory.figures()["sd15-16-bf16-channels_last"]
    found = bench.measure(Row("sd15", 16, LAST))
    assert found["note"] == f"out of memory, against an estimate of {gib} GiB"
    assert found["micro_batch"] == 16
    assert bench.measure(Row("sd15", 16))["note"] == "out of memory"
    fits = bench.measure(Row("sd15", 4, BF16))
    assert fits["flops_per_pair"] == 8e12
    assert fits["pairs_per_second"][0] == pytest.approx(8 / 0.001, rel=0.9)
    assert "note" not in fits


def test_every_row_of_our_own_has_a_figure() -> None:
    known = cuda_memory.figures()
    assert list(known) == [row.name for row in ROWS if not row.usual]
    assert known["sd15-1-bf16"] < known["sd15-4-bf16"] < known["sd15-16-bf16"] < known["sd15-32-bf16"]
    assert known["sd15-16-bf16-checkpointing"] < known["sd15-16-bf16"]
    assert sum(not cuda_memory.too_large(row, 79.2, known) for row in ROWS) > 30


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15-4-bf16", "sdxl-1-bf16-cached"])
def test_figures_of_rows_are_those_of_the_estimate(name: str) -> None:
    assert cuda_memory.needed(Row.named(name)) == pytest.approx(cuda_memory.figures()[name], rel=0.01)


def test_a_row_that_fails_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = _bench(monkeypatch, tmp_path, error=RuntimeError("no kernel"))
    found = bench.measure(Row("sd15", 16, LAST))
    assert found["note"] == "failed: RuntimeError"
    assert found["error"] == "no kernel"
    monkeypatch.setattr(cuda_speed, "Bench", lambda *_: bench)
    assert cuda_speed.main([*SMALL, "--models", "sdxl", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out.count("failed: RuntimeError") > 3


def test_no_row_starts_without_time_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = _bench(monkeypatch, tmp_path, minutes=0.5)
    assert bench.measure(Row("sd15", 1))["note"] == "not run: no time left"  # needs 75 s
    assert "note" not in bench.measure(Row("sd15", 16, LAST))


STUCK = """
import ctypes, sys, time
sys.path.insert(0, "bench")
import cuda_speed
class Stuck:
    def warm(self): ...
    def step(self, number):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # no signal's handler gets its turn in here
            ctypes.CDLL(None).poll(None, 0, 1000 * 60)
cuda_speed.GRACE = 1.0
first = cuda_speed.Bench._contender
def contender(self, row, *rest):
    return Stuck() if row.micro == 2 else first(self, row, *rest)
cuda_speed.Bench._contender = contender
sys.exit(cuda_speed.main(sys.argv[1:]))
"""


def test_a_row_that_does_not_end_is_cut_off_and_named(tmp_path: Path) -> None:
    """Where a signal would wait for C code to return, as it does for a first backward pass that compiles."""
    names = ["sd15-1-bf16", "sd15-2-bf16", "sd15-1-usual"]
    options = [*SMALL, "--minutes", "0.2", "--rows", *names, "--out", str(tmp_path)]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", STUCK, *options], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 58
    written = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert written[0]["pairs_per_second"][0] > 0
    assert [one.get("note") for one in written[1:]] == ["cut off: the time is up", "not run: no time left"]
    assert "cut off: the time is up" in (tmp_path / "table.md").read_text()


def test_rows_are_chosen_by_name_in_the_order_given(capsys: pytest.CaptureFixture[str]) -> None:
    def names(*asked: str, size: str = "full") -> list[str]:
        values = Namespace(models=["sd15"], size=size, rows=list(asked))
        return [row.name for row in cuda_speed.chosen(values)]

    assert names("sdxl-8-bf16-checkpointing", "sd15-1-usual") == ["sdxl-8-bf16-checkpointing", "sd15-1-usual"]
    assert names("sd15-*-usual") == ["sd15-1-usual", "sd15-8-usual", "sd15-16-usual", "sd15-4-usual",
                                     "sd15-32-usual"]  # fmt: skip
    assert names("sd15-64-fp32-lora-compile") == ["sd15-64-fp32-compile-lora"]  # in none of the lists
    assert names("sd15-16-bf16", "sd15-8-bf16", size="miniature") == ["sd15-2-bf16"]
    for wrong in ("sd16-1-usual", "sd15-3-bf16", "sd15-0-bf16", "sd15-8", "sd15-8-bf17", "sd15-*-nothing"):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            names(wrong)
    assert cuda_speed.main([*SMALL, "--rows", "sd15-8-bf17"]) == 2
    assert "bf17 after the micro-batch, not usual, fp32, bf16" in capsys.readouterr().err
    assert cuda_speed.main(["--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    listed = [line[0] for line in lines]
    assert {line[0]: float(line[1]) for line in lines if len(line) > 1} == cuda_memory.figures()
    assert listed == [row.name for row in ROWS]
    assert [Row.named(name) for name in listed] == list(ROWS)
    assert listed.index("sd15-16-bf16") < listed.index("sd15-16-bf16-channels_last")


def test_what_the_compiler_does_not_do_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A graph that breaks, and a code object with more graphs than dynamo keeps."""

    class Compiled(Scripted):
        def step(self, number: int) -> None:
            def broken(value: torch.Tensor) -> torch.Tensor:
                value = value + 1
                torch._dynamo.graph_break()
                return value * 2

            torch.compile(broken, backend="eager", dynamic=False)(torch.ones(2))
            small = torch.compile(lambda value: value + 1, backend="eager", dynamic=False)
            for size in range(2, 6):
                small(torch.ones(size))

    bench = _bench(monkeypatch, tmp_path)
    monkeypatch.setattr(cuda_speed.Bench, "_contender", lambda *_: Compiled(1))
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 2
    try:
        found = bench.measure(Row("sd15", 16, COMPILED | {"train.compile": False}))
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()
    assert len(found["graph_breaks"]) == 1
    assert "graph_break" in found["graph_breaks"][0] or "graph break" in found["graph_breaks"][0]
    assert len(found["limits_reached"]) == 1
    assert "recompile_limit (2)" in found["limits_reached"][0]


def _result(row: Row, speed: float, flops: float) -> dict[str, Any]:
    head = {"model": row.model, "what": row.what, "how": row.how, "micro_batch": row.micro}
    numbers = {"pairs_per_second": [speed, speed, speed], "peak_memory_gb": 12.34, "flops_per_pair": flops}
    return head | numbers


def test_table_by_hand() -> None:
    results = [
        _result(Row("sd15", 1), 5.0, 9e12),
        _result(Row("sd15", 8), 20.0, 9e12),
        _result(Row("sd15", 16, COMPILED), 45.0, 6.4e12)
        | {"graph_breaks": ["a print"], "limits_reached": ["2 graphs"]},
        _result(Row("sd15", 16, LAST), 40.0, 6.4e12),
        _result(Row("sdxl", 2, LAST), 6.0, 54e12),
        {
            "model": "sdxl",
            "what": "diffpref, MaPO full",
            "how": "bf16",
            "micro_batch": 2,
            "note": "out of memory",
        },
    ]
    table = cuda_rows.markdown(results, rate=800e12, goals=True, about="here")
    lines = [line for line in table.splitlines() if line.startswith("| SD")]
    assert len(lines) == 6
    assert lines[0].startswith("| SD1.5 | usual order, DPO | bf16 | 1 |")
    assert lines[3].endswith("| 45.00 (45.00 to 45.00) | 0.360 | 12.3 | 9.00 | 2.25 |")
    assert lines[4].endswith("| 6.00 (6.00 to 6.00) | 0.405 | 12.3 |  |  |")  # nothing to compare with
    assert lines[5] == "| SDXL | diffpref, MaPO full | bf16 | 2 | out of memory | | | | |"
    assert "SD1.5, DPO: **0.360** of the matmul rate (goal: at least 0.36)" in table
    assert "SDXL, DPO: **0.405** of the matmul rate (goal: at least 0.45)" in table
    assert "SD1.5, DPO over the usual order as launched: **9.00** (goal: at least 6)" in table
    assert "SD1.5, DPO over it at its best micro-batch: **2.25** (goal: at least 1.8)" in table
    assert "SD2.1" not in table  # no figure that was not measured
    assert "channels_last, compile: graphs break (a print)" in table
    assert "channels_last, compile: the compiler gave up, and parts ran uncompiled (2 graphs)" in table
    assert "1 of 6 rows have no numbers" in table


def test_full_size_step_on_a_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers.json"
    small = ["--size", "miniature", "--steps", "2", "--threads", "1"]
    assert full_size_step.main([*small, "--json", str(numbers)]) == 0
    found = json.loads(numbers.read_text())
    assert len(found["seconds"]) == 2
    assert 0 < found["trained"] < found["parameters"]
    assert found["trained_tensors"] / 2 < found["changed_tensors"] <= found["trained_tensors"]
    assert found["loss"] == pytest.approx(0.693, abs=0.05)
    shown = capsys.readouterr().out
    assert "miniature size" in shown
    assert "goal" not in shown
