from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml

from diffpref.config import TrainConfig, parse_train_config, to_dict
from diffpref.reporting.model_card import write_model_card


def card(folder: Path, **changes: dict) -> tuple[dict, str, TrainConfig]:
    table = {
        "model": {"base": "tiny:model"},
        "data": {"pairs": "tiny:pairs/train.parquet", "resolution": 64, **changes.get("data", {})},
        "objective": {"name": "dpo", "beta": 300.0},
        "adapter": changes.get("adapter", {}),
    }
    table["model"].update(changes.get("model", {}))
    config = parse_train_config(table)
    path = write_model_card(folder, config, {"steps": 100, "last": {"loss": 0.6543219}})
    text = path.read_text()
    assert path == folder / "README.md"
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body, config


def test_the_card_cites_the_paper_and_holds_the_whole_config(tmp_path: Path) -> None:
    front, body, config = card(tmp_path)
    assert front["library_name"] == "diffusers"
    assert {"diffpref", "dpo"} <= set(front["tags"])
    assert "base_model" not in front  # a folder on somebody's disk is no model of the hub
    assert "https://arxiv.org/abs/2311.12908" in body
    assert "2502.06023" not in body
    assert "| last.loss | 0.654322 |" in body
    resolved = tomllib.loads(body.split("```toml\n")[1].split("```")[0])
    assert resolved == to_dict(config)


def test_a_lora_of_a_hub_model_with_dual_captions(tmp_path: Path) -> None:
    front, body, _ = card(
        tmp_path,
        model={"base": "org/some-model"},
        data={"captions": "dual"},
        adapter={"type": "lora", "rank": 4},
    )
    assert front["base_model"] == "org/some-model"
    assert front["base_model_relation"] == "adapter"
    assert {"lora", "dual-captions"} <= set(front["tags"])
    assert "https://arxiv.org/abs/2502.06023" in body
    assert 'from_pretrained("org/some-model")' in body
    assert "load_lora_weights" in body


@pytest.mark.parametrize("adapter", [{}, {"type": "lora"}])
def test_the_snippet_is_python(tmp_path: Path, adapter: dict) -> None:
    _, body, _ = card(tmp_path, adapter=adapter)
    snippet = body.split("```python\n")[1].split("```")[0]
    assert "from_pretrained" in compile(snippet, "card", "exec").co_names
