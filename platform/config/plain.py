"""Configs as plain data: what they may hold, their exact JSON form, and their differences."""

import inspect
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from lamina.platform.errors import UserError

MISSING = inspect.Parameter.empty
"""Stands for a value that isn't there."""


def to_json(config: ConfigDict | FrozenConfigDict | Mapping) -> str:
    """Returns the config as JSON text; its arrays are tuples, so that `from_json` gives it back.

    Raises:
        UserError: the config holds what JSON can't.
    """
    problems = list(not_plain(config, ""))
    if problems:
        raise mistakes(problems)
    return json.dumps(thaw(config), indent=2, sort_keys=True, allow_nan=False) + "\n"


def from_json(text: str, where: str = "JSON") -> ConfigDict:
    """Returns the config that `to_json` wrote.

    Raises:
        UserError: the text isn't a JSON object, or holds null.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where} should hold a JSON object, not {type(tree).__name__}")

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return tuple(map(plain, value)) if isinstance(value, list) else value

    tree = plain(tree)
    problems = list(not_plain(tree, ""))
    if problems:
        raise mistakes(problems)
    return ConfigDict(tree)


def flatten(config: ConfigDict | FrozenConfigDict | Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns dotted keys to values, in sorted order."""
    flat: dict[str, Any] = {}
    for key in sorted(config):
        value = config[key]
        if isinstance(value, ConfigDict | FrozenConfigDict | Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def difference(
    old: Mapping, new: Mapping, free: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Returns dotted key to (old, new) where two configs differ; an absent value is `MISSING`.

    Args:
        old: a config.
        new: another one.
        free: keys and blocks whose differences don't count.
    """
    a, b = flatten(old), flatten(new)
    inside = lambda key: any(key == name or key.startswith(f"{name}.") for name in free)
    keys = sorted(key for key in a.keys() | b.keys() if not inside(key))
    pairs = {k: (a.get(k, MISSING), b.get(k, MISSING)) for k in keys}
    return {k: (x, y) for k, (x, y) in pairs.items() if x is MISSING or y is MISSING or x != y}


def describe_difference(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns one line per entry of `difference`."""
    shown = lambda v: "(absent)" if v is MISSING else repr(v)
    return "\n".join(f"  {key}: {shown(a)} -> {shown(b)}" for key, (a, b) in differences.items())


def thaw(value: Any) -> Any:
    """Returns plain nested dicts for a (frozen) config, leaving other values as they are."""
    if isinstance(value, ConfigDict | FrozenConfigDict | Mapping):
        return {k: thaw(v) for k, v in value.items()}
    return value


def not_plain(value: Any, path: str) -> Iterator[str]:
    """Yields what in a config couldn't be written to JSON and read back the same."""
    where = path or "the config"
    if isinstance(value, ConfigDict | FrozenConfigDict | Mapping):
        for key in value:
            if not isinstance(key, str) or "/" in key or "." in key or not key:
                yield f"{where} has the key {key!r}: keys are strings without '/' or '.'"
            else:
                yield from not_plain(value[key], f"{path}.{key}" if path else key)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from not_plain(item, f"{path}[{i}]")
    elif isinstance(value, list):
        yield f"{where} is a list: use a tuple (flags can't override lists)"
    elif value is None:
        yield f"{where} is None: give it a value (a placeholder that was never set?)"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} = {value} is not finite, which JSON can't hold"
    elif not isinstance(value, bool | int | float | str):
        yield (
            f"{where} is {type(value).__name__}: a config holds numbers, strings, booleans, "
            "tuples and nested blocks only"
        )


def mistakes(problems: Sequence[str]) -> UserError:
    """Returns the error that lists all `problems` of a config."""
    if len(problems) == 1:
        return UserError(f"config: {problems[0]}")
    return UserError(
        f"config: {len(problems)} mistakes\n" + "\n".join(f"  - {p}" for p in problems)
    )
