"""Pretraining of the small model, at a size for tests: stopped runs continue to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from diffpref.paths import resolve_existing
from diffpref.tiny import denoiser


def quiet(message: str) -> None:
    pass


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"CYCLES": (3, 3), "EXAMPLES": 100, "BATCH": 4, "SNAPSHOT_EVERY": 2}.items():
        monkeypatch.setattr(denoiser, name, value)
    return monkeypatch


def train(work: Path, until: int, patch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    shipped = StableDiffusionPipeline.from_pretrained(resolve_existing("tiny:model", "small model"))
    patch.setattr(denoiser, "STEPS", until)
    work.mkdir(exist_ok=True)
    denoiser.train_denoiser(work, shipped.vae, shipped.tokenizer, quiet)
    return load_file(denoiser.snapshot_path(work, until))


def test_a_stopped_run_continues_to_the_same_bits(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 6, small)
    half = train(tmp_path / "stopped", 4, small)
    continued = train(tmp_path / "stopped", 6, small)
    assert all(torch.equal(value, continued[name]) for name, value in whole.items())
    assert any(not torch.equal(value, half[name]) for name, value in whole.items())


def test_two_cosine_cycles_with_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoiser, "CYCLES", (1000, 2000))
    peak = denoiser.LEARNING_RATE
    assert denoiser._rate(0) == pytest.approx(peak / denoiser.WARMUP)
    assert denoiser._rate(500) == pytest.approx(peak * (0.05 + 0.95 / 2))  # the cosine's middle
    assert denoiser._rate(999) == pytest.approx(0.05 * peak, rel=1e-3)
    assert denoiser._rate(1000) == pytest.approx(peak / denoiser.WARMUP)
    assert denoiser._rate(2000) == pytest.approx(peak * (0.05 + 0.95 / 2))
    draws = [denoiser._timesteps(step, torch.Generator().manual_seed(step)) for step in range(3000)]
    first, second = torch.cat(draws[:1000]).double(), torch.cat(draws[1000:]).double()
    assert first.mean() == pytest.approx(499.5, abs=5)  # uniform
    assert second.mean() == pytest.approx(666.2, abs=5)  # the larger of two: two thirds of the range
