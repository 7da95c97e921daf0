"""Parsing of a command's arguments with absl, and of `--config.key=value` overrides."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags as absl_flags

from lamina.platform.errors import UserError


class Flag(NamedTuple):
    """A flag of a command.

    Attributes:
        default: its value when it isn't given; its type is the flag's type (a tuple: a list of
            strings, comma-separated).
        help: one line for the user.
    """

    default: Any
    help: str


class Arguments(NamedTuple):
    """What a command was given.

    Attributes:
        flags: name to value.
        overrides: (dotted key, text) of each `--config.key=value`, in order.
        positional: everything that is no flag.
    """

    flags: dict[str, Any]
    overrides: list[tuple[str, str]]
    positional: list[str]


def parse(command: str, arguments: Sequence[str], defined: dict[str, Flag]) -> Arguments:
    """Parses the arguments of `lamina COMMAND`.

    Raises:
        UserError: a flag is unknown, or its value has the wrong type.
    """
    overrides, rest = _take_overrides(arguments)
    values = absl_flags.FlagValues()
    define = {
        bool: absl_flags.DEFINE_boolean,
        int: absl_flags.DEFINE_integer,
        str: absl_flags.DEFINE_string,
        tuple: absl_flags.DEFINE_list,
    }
    for name, flag in defined.items():
        default = list(flag.default) if isinstance(flag.default, tuple) else flag.default
        define[type(flag.default)](name, default, flag.help, flag_values=values)
    try:
        positional = values([f"lamina {command}", *rest])[1:]
    except absl_flags.Error as error:
        known = ", ".join(f"--{name}" for name in defined)
        raise UserError(f"{error} (flags of this command: {known})") from error
    return Arguments({name: values[name].value for name in defined}, overrides, positional)


def _take_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    overrides, rest = [], []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        stripped = argument.lstrip("-")
        if not (argument.startswith("-") and stripped.startswith("config.")):
            rest.append(argument)
            continue
        key, given, text = stripped.removeprefix("config.").partition("=")
        if not given:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"{argument} needs a value: {argument}=VALUE")
            text = waiting.pop(0)
        overrides.append((key, text))
    return overrides, rest


CONFIG_FLAGS = {
    "config": Flag("", "a .py file with get_config(), a .json file, or a shipped experiment"),
    "trust": Flag((), "packages whose factories a JSON config may name"),
}


def load_config(arguments: Arguments) -> tuple[Any, Any, tuple[str, ...]]:
    """Loads `--config` and applies the overrides.

    Returns:
        The config to run, the config as its file gives it, and the trusted packages.

    Raises:
        UserError: there is no such config, or an override doesn't fit it.
    """
    from ml_collections import ConfigDict

    from lamina.platform import config as configs

    original, path = configs.load(arguments.flags["config"])
    changed = ConfigDict(original.to_dict())
    for key, text in arguments.overrides:
        configs.override(changed, key, text)
    trust = tuple(arguments.flags["trust"]) if path.suffix == ".json" else configs.EVERYONE
    given = [key for key, _ in arguments.overrides]
    for key in given:
        block, _, last = key.rpartition(".")
        if last == "name" and block in original and original[block].get("name") != changed[key]:
            _drop_keys_of_the_old_name(changed, block, trust, given)
    return changed, original, trust


def _drop_keys_of_the_old_name(
    config: Any, block: str, trust: Sequence[str], given: Sequence[str]
) -> None:
    """So that `--config.model.name=vit` needs no new config file."""
    from lamina.platform import config as configs
    from lamina.platform.programs.table import find

    kind = find(config).schema.kinds.get(block)
    if kind is not None:
        stay = [key.removeprefix(f"{block}.") for key in given if key.startswith(f"{block}.")]
        # A name that can't be looked up is told by `resolve`, with all other mistakes.
        with contextlib.suppress(UserError):
            configs.drop_foreign(config[block], kind, block, trust, stay)


def no_positional(command: str, arguments: Arguments) -> None:
    """Raises a `UserError` where a command that takes none was given positional arguments."""
    if arguments.positional:
        raise UserError(
            f"{arguments.positional[0]!r} is no flag, and `lamina {command}` takes only flags"
        )


def describe_flags(defined: dict[str, Flag]) -> str:
    """Returns the help lines of flags."""
    return "\n".join(f"  --{name:<15} {flag.help}" for name, flag in defined.items())
