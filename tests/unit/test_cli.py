"""The command line as users meet it: real processes, their exit codes and what they print."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMANDS = ("demo", "train", "encode", "generate", "score", "report", "check", "convert", "env")


def diffpref(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffpref", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_help_lists_every_command_without_loading_torch():
    code = (
        "import sys\nfrom diffpref.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    print('exit', end.code)\n"
        "print('heavy', {'torch', 'numpy', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("exit 0\nheavy set()\n")
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_own_help(command):
    done = diffpref(command, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith(f"usage: diffpref {command}")


def test_train_help_teaches_every_key_and_every_objective():
    text = " ".join(diffpref("train", "--help").stdout.split())  # lines are wrapped to the terminal
    for expected in (
        "--train.learning_rate X", "above 0, at most 1; default 1e-05", "--data.captions shared|dual",
        "[data.columns] names of the Parquet columns", "--model.base TEXT", "(required)",
        "--objective.beta X", " dpo ", " mapo ", " sft ",
    ):  # fmt: skip
        assert expected in text, expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean train?"),
        (["xyz"], "commands: demo, train"),
        (["--nope"], "see diffpref --help"),
        (["train"], "required: CONFIG"),
        (["train", "tiny-dpo", "--train.learning_rte", "1"], "did you mean train.learning_rate?"),
        (["train", "tiny-dpo", "--learning_rate", "1"], "did you mean --train.learning_rate?"),
        (["train", "tiny-dpo", "--train.steps"], "--train.steps needs a value"),
        (["train", "tiny-dpo", "extra"], "unrecognized arguments: extra"),
        (["train", "none.toml"], "config not found: none.toml"),
        (["train", "tiny-dpo", "--train.steps", "0"], "a whole number at least 1"),
        (["generate", "--modle", "x"], "did you mean --model?"),
        (["generate", "--model", "x", "--suite", "s", "--out", "o", "--batch", "0"], "must be at least 1"),
        (
            ["generate", "--model", "x", "--suite", "s", "--out", "o", "--limit", "-1"],
            "'-1' is not a whole number",
        ),
        (["score", ".", "--evaluators", ","], "--evaluators names none"),
        (["check", "x", "--columns.captoin", "y"], "did you mean --columns.caption?"),
    ],
)
def test_a_users_mistake_gives_one_message_and_exit_code_2(arguments, expected, tmp_path):
    done = diffpref(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_no_command_shows_the_help_and_fails():
    done = diffpref()
    assert done.returncode == 2
    assert "diffpref demo" in done.stdout


def test_version():
    from diffpref import __version__

    assert diffpref("--version").stdout == f"diffpref {__version__}\n"


def test_env_tells_versions_threads_and_how_to_get_what_is_missing():
    done = diffpref("env", env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    import torch

    assert torch.__version__ in done.stdout
    assert "1 in an operator" in done.stdout
    assert "OMP_NUM_THREADS" in done.stdout
    assert "diffpref[wandb]" in done.stdout or "wandb " in done.stdout


def test_a_closed_pipe_is_no_traceback():
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "diffpref", "train", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 141
    assert errors == b""


def test_ctrl_c_ends_with_130_and_one_line(tmp_path):
    """Interrupted while it waits for a config that never comes, through a named pipe."""
    pipe = tmp_path / "recipe.toml"
    os.mkfifo(pipe)
    with (
        subprocess.Popen(
            [sys.executable, "-m", "diffpref", "train", str(pipe)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # a shell's background job ignores SIGINT, and would pass that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
        pipe.open("w"),
    ):  # opens once the other end is open too, and keeps the reader waiting
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b"interrupted\n"


def test_an_interrupt_within_a_string_that_is_executed_ends_with_130_too(tmp_path):
    """Named tuples are made so; under ``python -m`` Python would end with the signal's code instead."""
    code = (
        "import diffpref.__main__ as entry, diffpref.cli as cli\n"
        "def main():\n"
        "    try:\n"
        "        exec('raise KeyboardInterrupt')\n"
        "    except KeyboardInterrupt:\n"
        "        print('told')\n"
        "        return cli.INTERRUPTED\n"
        "cli.main = main\n"
        "entry.enter()"
    )
    (tmp_path / "entered.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "entered"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"told\n", b"")


@pytest.mark.parametrize("delay", [0.15, 0.3, 0.6, 1.0, 1.6, 2.4])
def test_an_interrupt_at_any_moment_prints_one_line_at_most(delay):
    """While libraries are imported, too: half of them would tell of it in their own way."""
    with subprocess.Popen(
        [sys.executable, "-m", "diffpref", "estimate", "tiny-dpo"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) in [(130, b"interrupted\n"), (0, b""), (-signal.SIGINT, b"")]
