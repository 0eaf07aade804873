"""The command line. Each command imports what it runs only when it runs, so that help is quick."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import sys
from collections.abc import Sequence

from diffpref import __version__
from diffpref.commands import COMMANDS
from diffpref.commands.arguments import Parser
from diffpref.errors import UserError, nearest
from diffpref.paths import forget_tidied
from diffpref.texts import one_line, printable_stream

INTERRUPTED = 130  # 128 + SIGINT, as shells count
CLOSED_PIPE = 141  # 128 + SIGPIPE

SUMMARY = "Align text-to-image diffusion models with human preferences, and measure whether it helped."
EXAMPLES = """\
start here:
  diffpref demo                                  align the shipped small model, minutes on a CPU
  diffpref train tiny-dpo                        one of the shipped recipes, or the path of your own
  diffpref train my.toml --train.learning_rate 1e-6 --objective.beta 5000
  diffpref train --help                          every setting with its meaning, default and range
  accelerate launch -m diffpref train my.toml    the same on several GPUs

then compare the result with the base model:
  diffpref evaluate --baseline BASE --candidate RUN/model --suite SUITE --evaluators pickscore,... --out DIR

pairs of other formats, and a caption for each image:
  diffpref convert train.json --images images/ --out pairs/
  diffpref caption --pairs pairs/ --method hybrid --captioner transformers --captioner.model MODEL --out dual/
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 the user's mistake, 130 interrupted."""
    with (
        contextlib.redirect_stdout(printable_stream(sys.stdout)),
        contextlib.redirect_stderr(printable_stream(sys.stderr)),
    ):
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    # Else every run starts with transformers' note that it takes Pillow for want of torchvision.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger().handlers[0].setFormatter(_Prefixed())
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # peft imports it, and it talks of 4-bit kernels
    forget_tidied()
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails again
        return CLOSED_PIPE
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: the name is too long: {str(error.filename)[:60]}...", file=sys.stderr)
        return 2


class _Prefixed(logging.Formatter):
    """ "warning: ..." for warnings and errors, plain text for the rest; names stay within their line."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            record.args = tuple(
                one_line(str(arg)) if isinstance(arg, (str, os.PathLike)) else arg for arg in record.args
            )
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def _run(arguments: list[str]) -> int:
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 2
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise UserError(
                f"an argument is not UTF-8: {argument}",
                why="Parquet, TOML and JSON keep names as UTF-8, and Arrow opens no other file",
                fix="rename the file or the folder",
            )
    command = arguments[0]
    if not command.startswith("-") and command not in COMMANDS:
        close = nearest(command, COMMANDS)
        fix = f"did you mean {close}?" if close else "commands: " + ", ".join(COMMANDS)
        raise UserError(f"unknown command: {command}", fix=fix)
    if command not in COMMANDS:
        parser.parse_args(arguments)  # --help and --version end here
    chosen = COMMANDS[command]
    own = Parser(
        prog=f"diffpref {command}",
        description=chosen.SUMMARY,
        allow_abbrev=False,
        formatter_class=_Formatter,
        add_help=True,
    )
    takes_keys = chosen.add_arguments(own)
    rest = arguments[1:]
    overrides: list[tuple[str, str]] = []
    if takes_keys:
        from diffpref.config.overrides import split_overrides

        rest, overrides = split_overrides(rest)
    if takes_keys and {"-h", "--help"} & set(rest):
        _teach(own, command)
        return 0
    _refuse_unknown_options(own, rest)
    values = own.parse_args(rest)
    return chosen.run(values, overrides) or 0


def _refuse_unknown_options(parser: Parser, arguments: list[str]) -> None:
    """Name the nearest option for a misspelt one, before argparse misses what that one should have given."""
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name != "--" and name not in known:
            same_leaf = [
                option for option in known if option.endswith(f".{name[2:]}")
            ]  # learning_rate: train.learning_rate
            close = (
                same_leaf[0]
                if same_leaf
                else nearest(name, [option for option in known if option != "--help"])
            )
            fix = f"did you mean {close}?" if close else f"see {parser.prog} --help"
            raise UserError(f"{parser.prog} has no option {name}", fix=fix)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(110, _columns()))


def _columns() -> int:
    try:
        return max(60, os.get_terminal_size().columns - 2)
    except OSError:
        return 110


def _parser() -> Parser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}} {chosen.SUMMARY}" for name, chosen in COMMANDS.items())
    parser = Parser(
        prog="diffpref",
        usage="diffpref COMMAND ... | diffpref COMMAND --help",
        description=f"{SUMMARY}\n\ncommands:\n{commands}\n\n{EXAMPLES}",
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"diffpref {__version__}")
    return parser


def _teach(parser: Parser, command: str) -> None:
    """Help with every key of the config; the objectives' parameters last, since they take torch to list."""
    print(parser.format_help())
    sys.stdout.flush()
    from diffpref.config.help import describe_objectives

    print(describe_objectives())
