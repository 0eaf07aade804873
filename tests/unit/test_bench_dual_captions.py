"""bench/dual_captions.py: every method of the paper, and nothing but the captions differs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import dual_captions

    yield dual_captions
    for name in ("dual_captions", "recipes", "recipe_tables"):
        sys.modules.pop(name, None)


def test_each_method_is_trained_with_each_seed_and_only_captions_differ(bench, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from diffpref.config import load_train_config, to_dict

    plan = bench.plan(tmp_path, [0, 1], threads=1)
    names = [
        "dpo",
        "dcpo-c",
        *(f"dcpo-{kind}-{level}" for level in ("weak", "medium", "strong") for kind in "ph"),
    ]
    assert [(item.setting, item.seed) for item in plan] == [(name, seed) for name in names for seed in (0, 1)]
    configs = [to_dict(load_train_config(item.recipe, [*item.changes])) for item in plan]
    assert configs[0]["data"]["captions"] == "shared"
    assert {config["data"]["captions"] for config in configs[2:]} == {"dual"}
    for config in configs:
        del config["data"]["captions"], config["data"]["pairs"]
    assert all(config == configs[0] for config in configs)


def test_the_seven_sets_of_captions_are_those_of_the_paper(bench) -> None:  # type: ignore[no-untyped-def]
    made = {
        name: (options.method, getattr(options.perturber, "level", None))
        for name, options in bench.methods().items()
    }
    assert made == {
        "dcpo-c": ("captioning", None),
        "dcpo-p-weak": ("perturbation", "weak"), "dcpo-h-weak": ("hybrid", "weak"),
        "dcpo-p-medium": ("perturbation", "medium"), "dcpo-h-medium": ("hybrid", "medium"),
        "dcpo-p-strong": ("perturbation", "strong"), "dcpo-h-strong": ("hybrid", "strong"),
    }  # fmt: skip
