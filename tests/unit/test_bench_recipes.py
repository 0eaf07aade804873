"""The sweep tool: which runs it plans, what it averages over, and that it never repeats finished work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpref.errors import UserError
from diffpref.families.miniature import stable_diffusion
from diffpref.reporting.loading import load_folders
from tests.miniatures import config, rows, write_config, write_pairs
from tests.report_folders import scored_folder

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import recipe_tables
import recipes

ROOT = Path(__file__).parents[2]
SUITE = str(ROOT / "tests/data/suite.toml")


def finished(setting: str, seed: int, values: Any) -> recipe_tables.Finished:
    row = {"training_seconds": 30.0, "winner_gain": -2e-3, "loser_gain": None}
    return recipe_tables.Finished(setting, seed, np.asarray(values, dtype=float), row)


def test_plan_is_recipes_times_values_times_seeds() -> None:
    plan = recipes.combinations(
        ["tiny-dpo", "mine.toml"],
        ["train.steps=5"],
        ["objective.beta=1,2", "train.learning_rate=1e-5"],
        [0, 7],
    )
    assert len(plan) == 2 * 2 * 1 * 2
    assert len({item.name for item in plan}) == len(plan)
    assert plan[1].setting == "tiny-dpo, train.steps=5, objective.beta=1, train.learning_rate=1e-5"
    assert plan[1].seed == 7
    with pytest.raises(UserError, match="KEY=VALUE"):
        recipes.combinations(["tiny-dpo"], ["train.steps"], [], [0])


def test_training_time_is_that_of_the_logged_speeds() -> None:
    metrics = [
        {"step": 1, "pairs_per_second": 4.0},  # 1 step of 8 pairs at 4 a second: 2 s
        {"step": 11, "pairs_per_second": 16.0},  # 10 steps: 5 s
        {"step": 11, "validation": {"loss": 1.0}},
    ]
    assert recipes.training_seconds(metrics, batch_size=8) == 7.0


def test_gains_come_from_held_out_pairs_before_training_rows() -> None:
    trained = [{"winner_gain": float(i), "loser_gain": 0.0, "implicit_accuracy": 0.5} for i in range(20)]
    assert recipes.final_gains(trained)["winner_gain"] == 18.5  # rows 18 and 19
    held_out = {"step": 5, "validation": {"winner_gain": -1.0, "loser_gain": -2.0, "implicit_accuracy": 0.75}}
    assert recipes.final_gains([*trained, held_out])["winner_gain"] == -1.0
    assert recipes.final_gains([{"step": 1, "loss": 1.0}])["winner_gain"] is None  # sft without validation


def test_seeds_are_averaged_within_a_prompt_and_wins_counted_by_seed() -> None:
    base = np.array([[0.5], [0.5]])
    group = [finished("a", 0, [[0.7], [0.5]]), finished("a", 1, [[0.4], [0.6]])]
    assert recipe_tables.pooled(group) == pytest.approx(np.array([[0.55], [0.55]]))
    # prompt 0: a win and a loss; prompt 1: a tie and a win
    assert recipe_tables.win_rate(group, base, 0, 1.0).tolist() == [0.5, 0.75]
    assert recipe_tables.win_rate(group, base, 0, -1.0).tolist() == [0.5, 0.25]


def test_tables_show_base_settings_seeds_and_the_comparison(tmp_path: Path) -> None:
    base = load_folders(
        scored_folder(tmp_path / "base", 0.4, prompts=6), [scored_folder(tmp_path / "x", 0.9, prompts=6)]
    )[0]
    zeros = np.zeros((6, len(base.metrics)))
    settings = [
        finished("sft", 0, zeros + 0.5),
        finished("dpo", 0, zeros + 0.5),
        finished("dpo", 3, zeros + 0.75),
    ]
    text = recipe_tables.tables(base, settings, against="sft")
    main, note, seeds, against = text.split("\n\n")
    assert "6 prompts, 12 images a model" in note
    assert "| dpo | 2 | 62.5 % (" in main
    assert "−2.00e−03 | – | 30 s |" in main
    assert "| dpo | 0, 3 | " in seeds
    assert "| dpo | 62.5 % (+12.5; +12.5 to +12.5)" in against
    assert "75.0 %" in against  # win rate against sft: the tie of one seed, the win of the other
    assert "\n| sft" not in against


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("recipe")
    pairs = write_pairs(folder / "pairs.parquet", rows(4))
    tree = config(stable_diffusion(folder / "model"), pairs, folder / "unused", train__steps=1)
    return str(write_config(folder / "mine.toml", tree))


def test_a_sweep_ends_in_a_table_and_is_not_run_twice(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [recipe, "--seeds", "0", "1", "--suite", SUITE, "--limit", "2", "--out", str(tmp_path / "out")]
    assert recipes.main(command) == 0
    table = capsys.readouterr().out
    assert "| mine | 2 | " in table
    lines = (tmp_path / "out/results.jsonl").read_text()
    assert [json.loads(line)["seed"] for line in lines.splitlines()] == [0, 1]
    assert (tmp_path / "out/mine_seed-1/run/model/model_index.json").is_file()
    assert not (tmp_path / "out/mine_seed-1/run/checkpoints").exists()
    assert len(list((tmp_path / "out/cache").iterdir())) == 1

    assert recipes.main(command) == 0
    assert (tmp_path / "out/results.jsonl").read_text() == lines
    again = capsys.readouterr().out
    assert "== 1/2" not in again
    assert again.strip() == (tmp_path / "out/table.md").read_text().strip()


def test_a_wrong_setting_is_told_before_anything_runs(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert recipes.main([recipe, "--vary", "train.steps=1,-3", "--suite", SUITE, "--out", str(out)]) == 2
    assert "train.steps" in capsys.readouterr().err
    assert recipes.main([recipe, "--against", "mime", "--suite", SUITE, "--out", str(out)]) == 2
    assert "did you mean 'mine'" in capsys.readouterr().err
    assert not out.exists()
