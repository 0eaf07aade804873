from __future__ import annotations

import pytest
import torch

from diffpref.errors import UserError
from diffpref.processes import best_device, choose_device, place_in_launch


def test_a_process_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    place = place_in_launch()
    assert (place.rank, place.world, place.local_rank, place.main) == (5, 8, 1, False)


@pytest.mark.parametrize("world", ["", "1"])
def test_one_process_is_the_main_one_whatever_its_rank(world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", "3")
    assert place_in_launch().main


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_place_that_is_no_number_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "two")
    with pytest.raises(UserError, match="must be whole numbers"):
        place_in_launch()


def test_accelerate_may_ask_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device() == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert best_device() == choose_device(None, local_rank=1) == "cpu"


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="the device 'warp' cannot be used"):
        choose_device("warp")
