"""What a recipe may say, how overrides are read, and what the messages tell about mistakes."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from diffpref.config import (
    DataConfig,
    ModelConfig,
    TrainConfig,
    config_difference,
    load_train_config,
    parse_train_config,
    to_dict,
    to_toml,
)
from diffpref.config.loading import keys
from diffpref.config.overrides import split_overrides
from diffpref.config.values import in_words, inside
from diffpref.errors import UserError
from diffpref.paths import share_dir

MINIMAL = """\
[model]
base = "tiny:model"
[data]
pairs = "tiny:pairs/train.parquet"
"""


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a recipe: the required keys and what the test adds."""

    def write(text: str = "", base: str = MINIMAL) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(base + text)
        return path

    return write


def problem(path: Path, overrides=()) -> UserError:
    with pytest.raises(UserError) as caught:
        load_train_config(path, overrides)
    return caught.value


def test_left_out_keys_take_the_documented_defaults(recipe):
    config = load_train_config(recipe())
    assert config == TrainConfig(
        model=ModelConfig(base="tiny:model"),
        data=DataConfig(pairs="tiny:pairs/train.parquet"),
        objective=config.objective,
    )
    assert config.objective.name == "dpo"
    assert config.objective.params["beta"] == 2000.0  # arXiv 2311.12908 for SD1.5
    assert config.train.learning_rate == 1e-5
    assert config.adapter.target_modules == ("to_q", "to_k", "to_v", "to_out.0")


def test_values_of_the_file_keep_their_types(recipe):
    config = load_train_config(
        recipe('[train]\nlearning_rate = 1\nsteps = 7\n[sampling]\nprompts = ["a cat", "b"]\n')
    )
    assert type(config.train.learning_rate) is float  # an integer is fine where a number is wanted
    assert config.train.steps == 7
    assert config.sampling.prompts == ("a cat", "b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.learning_rate=1e-8", 1e-8),  # the value that YAML would read as text
        ("train.learning_rate=.5", 0.5),
        ("train.steps=12", 12),
        ("log.tensorboard=false", False),
        ("log.tensorboard=True", True),
        ("model.revision=main", "main"),
        ('model.revision="main"', "main"),
        ("model.revision=1.0", "1.0"),  # text stays text, whatever it looks like
        ("model.revision=true", "true"),
        ("model.revision=a = b", "a = b"),
        ("model.revision=", ""),
        ("data.columns.caption=prompt", "prompt"),
        ('adapter.target_modules=["to_q"]', ("to_q",)),
        ("objective.beta=500", 500.0),
    ],
)
def test_overrides_are_read_as_the_key_needs(recipe, text, expected):
    key, _, value = text.partition("=")
    got = to_dict(load_train_config(recipe('[adapter]\ntype = "lora"\n'), [(key, value)]))
    for part in key.split("."):
        got = got[part]
    assert got == (list(expected) if isinstance(expected, tuple) else expected)
    assert type(got) is (list if isinstance(expected, tuple) else type(expected))


def test_the_last_override_wins_and_overrides_win_over_the_file(recipe):
    path = recipe("[train]\nsteps = 1\n")
    assert load_train_config(path, [("train.steps", "2"), ("train.steps", "3")]).train.steps == 3
    assert load_train_config(path, {"train.steps": 4}).train.steps == 4  # typed values, from Python


def test_a_required_key_may_come_from_the_command_line(recipe):
    path = recipe(base='[data]\npairs = "p.parquet"\n')
    assert load_train_config(path, [("model.base", "org/name")]).model.base == "org/name"
    missing = problem(path)
    assert missing.what == f"{path}: model.base is missing"
    assert "--model.base" in missing.fix


@pytest.mark.parametrize(
    ("text", "what", "help_"),
    [
        ("[train]\nlearning_rte = 1e-6", "unknown key train.learning_rte", "train.learning_rate"),
        ("[trian]\nsteps = 5", "unknown key trian", "train"),
        ("[data.colums]\ncaption = 'x'", "unknown key data.colums", "data.columns"),
        ("[objective]\nbeeta = 3.0", "unknown key objective.beeta", "objective.beta"),
        (
            "[train]\nresolution = 64",
            "unknown key train.resolution",
            "data.resolution",
        ),  # in the wrong section
        ("[train]\nzzzzz = 64", "unknown key train.zzzzz", "--help"),
        ("[train]\nsteps = 1.5", "train.steps = 1.5", "a whole number at least 1"),
        ("[train]\nsteps = true", "train.steps = true", "a whole number"),
        ('[train]\nsteps = "100"', 'train.steps = "100"', "write 100 without quotes"),
        ("[train]\nsteps = 100.0", "train.steps = 100.0", "write 100"),
        ("[train]\nsteps = 0", "train.steps = 0", "at least 1"),
        ("[train]\nlearning_rate = 0", "train.learning_rate = 0", "above 0, at most 1"),
        ("[train]\nlearning_rate = nan", "train.learning_rate = nan", "finite"),
        ("[train]\nmax_grad_norm = inf", "train.max_grad_norm = inf", "finite"),
        ("[train]\nema_decay = 1.0", "train.ema_decay = 1.0", "from 0 to below 1"),
        ("[log]\nwandb = 1", "log.wandb = 1", "true or false"),
        ("[model]\nrevision = 3", "model.revision = 3", 'write "3" with quotes'),
        ("[train]\nmixed_precision = 'bf61'", "train.mixed_precision", "'bf16'"),
        ("[objective]\nname = 'dop'", "objective.name", "'dpo'"),
        ("[objective]\nname = 'mapo'\nscale = 0.5", "objective.scale has no effect", "form"),
        ("[objective]\nbeta = 'high'", 'objective.beta = "high"', "a number"),
        ("[sampling]\nprompts = 'a cat'", "sampling.prompts", "a list of texts"),
        ("[sampling]\nprompts = ['a', 2]", "sampling.prompts", "2 in it"),
        ("[data]\nresolution = 100", "data.resolution = 100", "96 and 104"),
    ],
)
def test_mistakes_in_the_file_are_named_with_what_is_allowed(recipe, text, what, help_):
    tables = tomllib.loads(text)
    merged = {
        name: {**tomllib.loads(MINIMAL).get(name, {}), **tables.get(name, {})}
        for name in {"model", "data", *tables}
    }
    with pytest.raises(UserError) as caught:
        parse_train_config(merged, source="recipe.toml")
    assert caught.value.what.startswith("recipe.toml: ")
    assert what in caught.value.what
    assert help_ in f"{caught.value.why} {caught.value.fix}"


@pytest.mark.parametrize(
    ("override", "what", "help_"),
    [
        (("train.learning_rte", "1"), "unknown key train.learning_rte", "train.learning_rate"),
        (("learning_rate", "1"), "unknown key learning_rate", "train.learning_rate"),
        (("objective.beeta", "1"), "unknown key objective.beeta", "objective.beta"),
        (("train", "1"), "train is a section", "--train."),
        (("train.steps", "many"), 'train.steps = "many"', "a whole number"),
        (("train.steps", "1e3"), 'train.steps = "1e3"', "a whole number"),
        (("log.wandb", "yes"), 'log.wandb = "yes"', "true or false"),
        (("adapter.target_modules", "to_q,to_k"), "adapter.target_modules", '["first", "second"]'),
        (("adapter.target_modules", '["a"]\nx = 1'), "adapter.target_modules", '["first", "second"]'),
        (("model.base", "caf\udce9"), "model.base", "not UTF-8"),
    ],
)
def test_mistakes_on_the_command_line_are_told_from_those_in_the_file(recipe, override, what, help_):
    error = problem(recipe(), [override])
    assert error.what.startswith("the command line: ")
    assert what in error.what
    assert help_ in f"{error.why} {error.fix}"


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"train.min_timestep": 600, "train.max_timestep": 500}, "train.min_timestep = 600 is above"),
        ({"train.steps": 5, "train.warmup_steps": 6}, "train.warmup_steps = 6 is more than"),
        ({"train.batch_size": 16, "train.micro_batch": 5}, "train.micro_batch = 5 does not divide"),
        ({"validation.every": 10}, "data.validation is empty"),
        ({"output": " "}, "output is empty"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(recipe, overrides, what):
    assert what in problem(recipe(), overrides).what


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        ({"adapter.rank": 8}, 'adapter.rank has no effect because adapter.type is "none"'),
        ({"validation.pairs": 8}, "validation.pairs has no effect because data.validation is empty"),
        (
            {"data.columns.caption_0": "x"},
            'data.columns.caption_0 has no effect because data.captions is "shared"',
        ),
        ({"adapter.rank": 8, "adapter.type": "lora"}, None),
    ],
)
def test_settings_without_effect_are_warned_about(recipe, caplog, overrides, warning):
    load_train_config(recipe(), overrides)
    messages = [record.getMessage() for record in caplog.records]
    assert any(warning in message for message in messages) if warning else not messages


def test_another_objective_does_not_inherit_parameters_whose_names_happen_to_match(recipe, caplog):
    """beta 2000 is usual for DPO and absurd for MaPO: parameters belong to the objective of their file."""
    path = recipe('[objective]\nname = "dpo"\nbeta = 777.0\n')
    config = load_train_config(path, [("objective.name", "mapo")])
    assert config.objective.name == "mapo"
    assert 777.0 not in config.objective.params.values()
    assert "objective.beta" in caplog.text
    again = load_train_config(path, [("objective.name", "dpo")])
    assert again.objective.params["beta"] == 777.0


@pytest.mark.parametrize(
    ("content", "what", "why"),
    [
        (b"[train]\nsteps = \n", "not valid TOML", "line 2"),
        (b"[train]\nschedule = cosine\n", "not valid TOML", "schedule = cosine"),
        (b"[train]\nsteps = 1\nsteps = 2\n", "not valid TOML", "line 3"),
        (b"caption = '\xff\xfe'", "not UTF-8 text", "0xff"),
    ],
)
def test_an_unreadable_file_is_named_with_the_line(tmp_path, content, what, why):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    error = problem(path)
    assert error.what == f"{path}: {what}"
    assert why in error.why


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "is a folder" in problem(tmp_path).what
    assert "config not found" in problem(tmp_path / "none.toml").what
    assert "did you mean 'tiny-dpo'" in problem(Path("tiny-dpa")).fix


def test_a_section_must_be_a_table():
    with pytest.raises(UserError, match="train is a section"):
        parse_train_config({"train": 3, **tomllib.loads(MINIMAL)})


def test_the_resolved_config_loads_again_as_the_same_config(recipe, tmp_path):
    config = load_train_config(
        recipe(),
        {
            "sampling.prompts": ['a "quoted" \\ prompt', "zwei Äpfel\n\tund 苹果 \x7f", ""],
            "train.learning_rate": 2.05e-8,
            "objective.name": "mapo",
        },
    )
    saved = tmp_path / "config.toml"
    saved.write_text(to_toml(config), encoding="utf-8")
    assert load_train_config(saved) == config
    json.dumps(to_dict(config))


def test_every_key_has_a_meaning_and_survives_the_round_trip():
    config = parse_train_config(tomllib.loads(MINIMAL))
    written = tomllib.loads(to_toml(config))
    for key, spec in keys().items():
        assert spec.help, key
        value = written
        for part in key.split("."):
            value = value[part]


def test_differences_name_the_key_and_both_values(recipe):
    a = load_train_config(recipe())
    b = load_train_config(recipe(), {"train.learning_rate": 2e-5, "objective.name": "sft"})
    lines = config_difference(a, b)
    assert "train.learning_rate: 1e-05 -> 2e-05" in lines
    assert 'objective.name: "dpo" -> "sft"' in lines
    assert "objective.beta: 2000.0 -> (unset)" in lines
    assert config_difference(a, a) == []


def test_configs_cannot_be_changed(recipe):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_train_config(recipe()).train.steps = 3


@pytest.mark.parametrize(
    "path", sorted((share_dir("configs") / "train").glob("*.toml")), ids=lambda path: path.stem
)
def test_every_shipped_recipe_is_valid_and_has_no_idle_setting(path, caplog):
    load_train_config(path)
    assert not caplog.records


def test_overrides_are_told_from_other_arguments():
    arguments = [
        "--train.steps",
        "5",
        "a.toml",
        "--seed=3",
        "--objective.beta",
        "-1",
        "--output",
        "x=y",
        "--verbose",
    ]
    rest, overrides = split_overrides(arguments)
    assert rest == ["a.toml", "--verbose"]
    assert overrides == [("train.steps", "5"), ("seed", "3"), ("objective.beta", "-1"), ("output", "x=y")]
    for arguments in (["--train.steps"], ["--train.steps", "--seed", "1"]):
        with pytest.raises(UserError, match=r"--train\.steps needs a value"):
            split_overrides(arguments)


def test_intervals():
    assert [inside(x, "[0, 1)") for x in (-0.1, 0, 0.5, 1)] == [False, True, True, False]
    assert [inside(x, "(0, inf)") for x in (0, 1e-300, 1e300)] == [False, True, True]
    assert in_words("[0, 1)") == "from 0 to below 1"
    assert in_words("(0, 1)") == "above 0, below 1"


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("dcpo", '"dpo" with data.captions = "dual"'),
        ("DCPO", '"dpo" with data.captions = "dual"'),
        ("Diffusion-DPO", '"dpo"'),
        ("MaPO", '"mapo"'),
        ("diffusion_dpo", '"dpo"'),
    ],
)
@pytest.mark.parametrize("place", ["file", "command line"])
def test_a_method_by_another_name_is_told_how_it_is_called_here(tmp_path, name, fix, place):
    recipe = share_dir("configs") / "train" / "tiny-dpo.toml"
    overrides = [("objective.name", name)] if place == "command line" else []
    if place == "file":
        text = recipe.read_text().replace('name = "dpo"', f'name = "{name}"')
        recipe = tmp_path / "my.toml"
        recipe.write_text(text)
    with pytest.raises(UserError, match=f'objective.name = "{name}" is not allowed') as caught:
        load_train_config(recipe, overrides)
    assert caught.value.fix == f"that method is objective.name = {fix}"
