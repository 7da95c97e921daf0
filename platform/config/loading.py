"""Configs from files, from shipped experiments, and from the command line's overrides."""

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from lamina.platform.config import names
from lamina.platform.config.plain import from_json, thaw
from lamina.platform.errors import UserError


def experiments_folder() -> Path:
    """Returns the folder of the shipped experiments."""
    # A namespace package may have several entries, and an editable install adds one of its own.
    entries = map(Path, importlib.import_module("lamina.experiments").__path__)
    return next(path for path in entries if path.is_dir())


def shipped_experiments() -> dict[str, Path]:
    """Returns name to file for every shipped experiment, sub-folders included.

    An experiment in a sub-folder has its bare name too where no other experiment has it.
    """
    root = experiments_folder()
    files = sorted(p for p in root.rglob("*.py") if not p.name.startswith("_"))
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in files}


def load(reference: str) -> tuple[ConfigDict, Path]:
    """Loads a config: `PATH[:ARG]` (Python or JSON), or `NAME[:ARG]` of a shipped experiment.

    Returns:
        The config as its file gives it, and the file.

    Raises:
        UserError: there is no such file or experiment, or it doesn't give a config.
    """
    if not reference:
        raise UserError(
            "--config is empty: give a file or one of " + names.listing(shipped_experiments())
        )
    whole = Path(reference).is_file()  # a path may hold colons
    name, _, argument = (reference, "", "") if whole else reference.partition(":")
    path = _find(name)
    if path.suffix == ".json":
        return from_json(path.read_bytes().decode("utf-8", "replace"), str(path)), path
    spec = importlib.util.spec_from_file_location(f"lamina_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise UserError(f"{path} has no get_config(): a config file defines it")
    takes_argument = bool(inspect.signature(get_config).parameters)
    if argument and not takes_argument:
        raise UserError(f"{path}: get_config() takes no argument, but {argument!r} was given")
    try:
        config = get_config(argument) if argument else get_config()
        if not isinstance(config, ConfigDict | FrozenConfigDict | Mapping):
            raise TypeError(f"it gave {type(config).__name__}, not a ConfigDict")
        # Reads every value: a placeholder that was never set, or keys of several types, fail here.
        return ConfigDict(ConfigDict(thaw(config)).to_dict()), path
    except Exception as error:
        raise UserError(
            f"{path}: get_config({argument!r}) failed: {type(error).__name__}: {error}"
        ) from error


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".py", ".json"):
        if not path.is_file():
            raise UserError(f"--config: there is no file {name}")
        return path
    shipped = shipped_experiments()
    if name in shipped:
        return shipped[name]
    bare = [p for n, p in shipped.items() if n.rpartition("/")[2] == name]
    if len(bare) == 1:
        return bare[0]
    raise UserError(
        f"--config: {name!r} is neither a .py or .json file nor a shipped experiment"
        f"{names.nearest(name, shipped)}: one of {names.listing(shipped)}"
    )


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets the dotted `key` of `config` from a command line's text.

    The text is read as a Python literal (`1e-3`, `True`, `(0, 1)`, `0,1,2`), and as a string where
    it is none, or where the config has a string there; `a,b` is two strings where the config has a
    tuple. A tuple may replace a block, as the values of a sweep do its range. A key that the file
    doesn't set may be given: `resolve` checks it.

    Raises:
        UserError: a part of the path is a value and not a block.
    """
    *parents, last = key.split(".")
    block = config
    for i, parent in enumerate(parents):
        if parent not in block:
            block[parent] = ConfigDict()
        block = block[parent]
        if not isinstance(block, ConfigDict):
            raise UserError(f"--config.{key}: {'.'.join(parents[: i + 1])} is a value, not a block")
    current = block.get(last)
    value = text if isinstance(current, str) else _literal(text)
    if isinstance(current, ConfigDict) and not isinstance(value, tuple):
        raise UserError(
            f"--config.{key}={text}: {key} is a block; set one of "
            + names.listing(f"{key}.{k}" for k in current)
        )
    if isinstance(current, tuple) and not isinstance(value, tuple):
        value = names.split(value) if isinstance(value, str) else (value,)
    with block.ignore_type(), block.unlocked():
        block[last] = value


def _literal(text: str) -> Any:
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return tuple(value) if isinstance(value, list) else value
