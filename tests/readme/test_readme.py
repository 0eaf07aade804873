"""The README's commands, run as they stand there, and what else it promises that can be checked."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from diffpref.evaluators import EVALUATORS
from diffpref.objectives import OBJECTIVES
from diffpref.paths import resolve_existing

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_RUN = {"make-demo", "pip-demo", "gpus", "make-test"}
"""Blocks that take minutes, install something or need hardware; the README marks each with its name."""
BLOCK = re.compile(r"(?:<!-- not run by the tests: (?P<name>\S+) -->\n)?```bash\n(?P<text>.*?)```", re.DOTALL)

SMALLER = """#!/bin/bash
case "$1" in
  train) set -- "$@" --train.steps 3 --train.warmup_steps 1 --train.batch_size 4 --train.threads 1 \\
                     --log.every 1 --sampling.count 2 --sampling.steps 2 ;;
  evaluate) set -- "$@" --limit 3 ;;
esac
exec "{python}" -m diffpref "$@"
"""
"""Stands for `diffpref` on the path: the README's commands run unchanged, at a size for tests."""


def shipped(path: Path, count: int) -> None:
    """The user's own pairs: the first of the held-out ones that ship with the package."""
    table = pq.read_table(resolve_existing("tiny:pairs/validation.parquet", "pairs"))
    pq.write_table(table.slice(0, count), path)


def toml_block(text: str) -> str:
    match = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert match
    return match[1]


@pytest.mark.slow
def test_the_commands_work_as_they_stand(tmp_path: Path) -> None:
    shim = tmp_path / "bin" / "diffpref"
    shim.parent.mkdir()
    shim.write_text(SMALLER.format(python=sys.executable))
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    place = tmp_path / "here"
    place.mkdir()
    shipped(place / "my-pairs.parquet", 24)
    (place / "my.toml").write_text(toml_block(README))
    environ = {
        **os.environ,
        "PATH": f"{shim.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    run = [match["text"] for match in BLOCK.finditer(README) if match["name"] not in NOT_RUN]
    assert run
    for block in run:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=place, env=environ, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stderr[-3000:]}"
    assert (place / "runs/eval/report.html").stat().st_size > 10_000
    assert (place / "runs/mine/model/model_index.json").is_file()
    assert (place / "runs/captions/captions-report.html").stat().st_size > 10_000
    assert (place / "runs/mine-dcpo/model/model_index.json").is_file()
    rows = [json.loads(line) for line in (place / "runs/mine/metrics.jsonl").read_text().splitlines()]
    documented = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")
    assert [key for key in {key for row in rows for key in row} if f"`{key}`" not in documented] == []


def test_blocks_that_are_not_run_are_the_named_ones() -> None:
    named = [match["name"] for match in BLOCK.finditer(README) if match["name"]]
    assert sorted(named) == sorted(NOT_RUN)
    assert README.count("```bash") == len(BLOCK.findall(README))


def test_the_recipe_is_one_of_ten_lines_or_so_that_loads(tmp_path: Path) -> None:
    from diffpref.config import load_train_config

    (tmp_path / "my.toml").write_text(toml_block(README))
    config = load_train_config(tmp_path / "my.toml")
    assert config.objective.params["beta"] == 2000.0
    leaves = [line for line in toml_block(README).splitlines() if "=" in line]
    assert len(leaves) <= 10
    assert tomllib.loads(toml_block(README))["data"]["pairs"] == "my-pairs.parquet"


def test_every_objective_is_in_the_table() -> None:
    table = README.split("## Objectives")[1].split("##")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(OBJECTIVES)


def test_every_evaluator_is_in_the_table() -> None:
    table = README.split("## Evaluators")[1].split("##")[0]
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(.+?)`", row)
    }
    assert named - {"--evaluators"} == {name for name in EVALUATORS if not name.endswith("-aliased")}


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
