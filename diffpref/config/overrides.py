"""Takes `--a.b VALUE` and `--a.b=VALUE` out of a command line, for any key: the loader judges them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from diffpref.config.loading import keys
from diffpref.errors import UserError


def split_overrides(
    arguments: Sequence[str], plain: Collection[str] | None = None
) -> tuple[list[str], list[tuple[str, str]]]:
    """The arguments that are no overrides, and the overrides as (dotted key, text) in order.

    An override is an option whose name holds a dot, or one of `plain`, the keys of the top level. Its value
    is the next argument, whatever it looks like except another long option, so that numbers below zero work.
    """
    top = {key for key in keys() if "." not in key} if plain is None else set(plain)
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument == "--":
            return rest + list(arguments[position:]), overrides
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or ("." not in name and name not in top):
            rest.append(argument)
            continue
        if not equals:
            if position == len(arguments) or arguments[position].startswith("--"):
                raise UserError(f"--{name} needs a value", fix=f"--{name} VALUE or --{name}=VALUE")
            value = arguments[position]
            position += 1
        overrides.append((name, value))
    return rest, overrides
