"""Configs: loading, overriding, checking against signatures, and an exact JSON form.

A config is an `ml_collections.ConfigDict` of plain data. Blocks with a `name` are looked up in a
table of factories; a factory's positional parameters are supplied by the platform, and its
keyword-only parameters are the block's keys. `resolve` fills in defaults from those signatures and
reports every mistake at once; `build` calls the factory.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from lamina.platform.errors import UserError

MISSING = inspect.Parameter.empty
EVERYONE = ("*",)
"""Trust for configs that the user wrote as Python: any `module:factory` name may be imported."""


class Option(NamedTuple):
    """One key of a factory: its type (a plain annotation, or `Any`) and default (or `MISSING`)."""

    type: Any
    default: Any


def options(factory: Callable) -> dict[str, Option]:
    """Returns the config keys of `factory`, from its signature.

    They are its keyword-only parameters; for a `NamedTuple` class, all its fields.
    """
    parameters = inspect.signature(factory, eval_str=True).parameters.values()
    if isinstance(factory, type) and issubclass(factory, tuple):
        keys = list(parameters)
    else:
        keys = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {
        p.name: Option(Any if p.annotation is MISSING else p.annotation, p.default) for p in keys
    }


class Kind(NamedTuple):
    """A named block of the config.

    Attributes:
        table: name to factory, written out in the package of that kind.
        options: gives the keys of a factory (default: from its signature).
        shared: a `NamedTuple` class whose fields are keys of every block of this kind.
    """

    table: Mapping[str, Callable]
    options: Callable[[Any], dict[str, Option]] = options
    shared: type | None = None


class Schema(NamedTuple):
    """The vocabulary of one program's config.

    Attributes:
        settings: a `NamedTuple` class whose fields are the plain top-level keys.
        blocks: key to a factory or `NamedTuple` class, for blocks without a name.
        kinds: key to `Kind`, for named blocks.
    """

    settings: type
    blocks: Mapping[str, Callable]
    kinds: Mapping[str, Kind]


# --- resolving -----------------------------------------------------------------------------------


def resolve(
    config: ConfigDict | Mapping, schema: Schema, trust: Sequence[str] = EVERYONE
) -> FrozenConfigDict:
    """Checks `config` against `schema` and fills in every default.

    Args:
        config: what the user wrote.
        schema: the program's vocabulary.
        trust: packages from which `"package.module:factory"` names may be imported; `EVERYONE` for
            configs that are the user's own code.

    Returns:
        The whole config, frozen: each key of the schema has a value.

    Raises:
        UserError: lists all unknown, missing and mistyped keys, with the nearest valid names.
    """
    problems = list(_not_plain(config, ""))
    if problems:
        raise _problems(problems)
    resolved: dict[str, Any] = {}
    settings = options(schema.settings)
    known = [*settings, *schema.blocks, *schema.kinds]
    for key in config:
        if key not in known:
            problems.append(_unknown(key, known))
    _bind({k: v for k, v in config.items() if k in settings}, settings, "", resolved, problems)
    for key, factory in schema.blocks.items():
        block = _block(config, key, problems)
        resolved[key] = {}
        _bind(block, options(factory), f"{key}.", resolved[key], problems)
    for key, kind in schema.kinds.items():
        block = _block(config, key, problems)
        resolved[key] = _resolve_named(block, key, kind, trust, problems)
    if problems:
        raise _problems(problems)
    return FrozenConfigDict(resolved)


def _resolve_named(block, key: str, kind: Kind, trust, problems: list[str]) -> dict:
    name = block.get("name")
    if not isinstance(name, str) or not name:
        problems.append(f"{key}.name is missing: one of {_listing(kind.table)}")
        return {}
    try:
        keys = dict(kind.options(lookup(name, kind.table, key, trust)))
    except UserError as error:
        problems.append(str(error))
        return {}
    if kind.shared is not None:
        keys = options(kind.shared) | keys
    resolved = {"name": name}
    _bind({k: v for k, v in block.items() if k != "name"}, keys, f"{key}.", resolved, problems)
    return resolved


def lookup(name: str, table: Mapping[str, Callable], kind: str, trust: Sequence[str]) -> Callable:
    """Returns the factory called `name`: a table's entry, or the user's `"package.module:factory"`.

    Raises:
        UserError: the name is neither in the table nor importable, or its package isn't trusted.
    """
    if ":" not in name:
        if name not in table:
            raise UserError(
                f"{kind}.name = {name!r} is unknown{_nearest(name, table)}: "
                f"one of {_listing(table)}, or 'package.module:factory'"
            )
        return table[name]
    module_name, _, attribute = name.partition(":")
    package = module_name.partition(".")[0]
    if tuple(trust) != EVERYONE and package not in trust:
        raise UserError(
            f"{kind}.name = {name!r} would import somebody's code: "
            f"pass --trust={package} if you trust that package"
        )
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{kind}.name = {name!r} cannot be imported: {error}") from error


def build(block: Mapping, kind: Kind, key: str, trust: Sequence[str], *supplied: Any) -> Any:
    """Calls the factory that a resolved, named block stands for.

    Args:
        block: the resolved block, with its `name`.
        kind: its kind.
        key: where it stands in the config, for messages.
        trust: as in `resolve`.
        *supplied: the factory's positional arguments (keys, data spec, dtype).

    Raises:
        UserError: the factory refused its arguments (a `ValueError`, with its message).
    """
    factory = lookup(block["name"], kind.table, key, trust)
    keys = kind.options(factory)
    arguments = {k: thaw(v) for k, v in block.items() if k in keys}
    try:
        return factory(*supplied, **arguments)
    except ValueError as error:
        raise UserError(f"{key} ({block['name']}): {error}") from error


def thaw(value: Any) -> Any:
    """Returns plain nested dicts for a (frozen) config, leaving other values as they are."""
    if isinstance(value, ConfigDict | FrozenConfigDict | Mapping):
        return {k: thaw(v) for k, v in value.items()}
    return value


def _block(config, key: str, problems: list[str]) -> Mapping[str, Any]:
    block = thaw(config.get(key, {}))
    if isinstance(block, dict):
        return block
    problems.append(f"{key} = {block!r} should be a block of keys, such as {key}=dict(...)")
    return {}


def _bind(given: Mapping, keys: Mapping[str, Option], prefix: str, into: dict, problems: list[str]):
    """Puts the value or the default of every key into `into`, and what is wrong into `problems`."""
    for key in given:
        if key not in keys:
            problems.append(_unknown(key, keys, prefix))
    for key, option in keys.items():
        if key not in given:
            if option.default is MISSING:
                problems.append(f"{prefix}{key} is missing: {_type_name(option.type)} is needed")
            else:
                into[key] = thaw(option.default)
            continue
        value = thaw(given[key])
        try:
            into[key] = _typed(value, option.type)
        except TypeError:
            problems.append(f"{prefix}{key} = {value!r} should be {_type_name(option.type)}")


def _typed(value: Any, wanted: Any) -> Any:
    """Returns `value` as type `wanted` (an int where a float is wanted becomes one), or raises."""
    origin = typing.get_origin(wanted)
    if wanted is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for choice in typing.get_args(wanted):
            try:
                return _typed(value, choice)
            except TypeError:
                continue
        raise TypeError
    if origin is typing.Literal:
        if value in typing.get_args(wanted):
            return value
        raise TypeError
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if wanted is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if wanted in (bool, str) and isinstance(value, wanted):
        return value
    if wanted is tuple or origin is tuple:
        if not isinstance(value, tuple):
            raise TypeError
        arguments = typing.get_args(wanted)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_typed(v, arguments[0]) for v in value)
        if arguments and len(arguments) != len(value):
            raise TypeError
        return (
            tuple(_typed(v, a) for v, a in zip(value, arguments, strict=True))
            if arguments
            else value
        )
    if _is_block(wanted) and isinstance(value, Mapping):
        return dict(value)
    raise TypeError


def _is_block(wanted: Any) -> bool:
    return wanted in (Mapping, dict, ConfigDict) or typing.get_origin(wanted) in (Mapping, dict)


def _type_name(wanted: Any) -> str:
    if typing.get_origin(wanted) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(wanted)))
    if _is_block(wanted):
        return "a block of keys"
    if isinstance(wanted, type) and typing.get_origin(wanted) is None:
        article = "an" if wanted.__name__[0] in "aeiou" else "a"
        return f"{article} {wanted.__name__}"
    return str(wanted).replace("typing.", "")


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _listing(names) -> str:
    return ", ".join(sorted(map(str, names)))


def _unknown(key: str, known, prefix: str = "") -> str:
    return f"{prefix}{key} is not a key{_nearest(key, known)}: valid are {_listing(known)}"


def _problems(problems: Sequence[str]) -> UserError:
    if len(problems) == 1:
        return UserError(f"config: {problems[0]}")
    return UserError(
        f"config: {len(problems)} mistakes\n" + "\n".join(f"  - {p}" for p in problems)
    )


def _not_plain(value: Any, path: str) -> Iterator[str]:
    """Yields what in a config couldn't be written to JSON and read back the same."""
    where = path or "the config"
    if isinstance(value, ConfigDict | FrozenConfigDict | Mapping):
        for key in value:
            if not isinstance(key, str) or "/" in key or "." in key or not key:
                yield f"{where} has the key {key!r}: keys are strings without '/' or '.'"
            else:
                yield from _not_plain(value[key], f"{path}.{key}" if path else key)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _not_plain(item, f"{path}[{i}]")
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


# --- JSON ----------------------------------------------------------------------------------------


def to_json(config: ConfigDict | FrozenConfigDict | Mapping) -> str:
    """Returns the config as JSON text; its arrays are tuples, so that `from_json` gives it back.

    Raises:
        UserError: the config holds what JSON can't.
    """
    problems = list(_not_plain(config, ""))
    if problems:
        raise _problems(problems)
    return json.dumps(thaw(config), indent=2, sort_keys=True, allow_nan=False) + "\n"


def from_json(text: str, where: str = "JSON") -> ConfigDict:
    """Returns the config that `to_json` wrote.

    Raises:
        UserError: the text isn't a JSON object, or holds null.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where} should hold a JSON object, not {type(tree).__name__}")

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return tuple(map(plain, value)) if isinstance(value, list) else value

    tree = plain(tree)
    problems = list(_not_plain(tree, ""))
    if problems:
        raise _problems(problems)
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


def difference(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """Returns dotted key to (old, new) where two configs differ; an absent value is `MISSING`."""
    a, b = flatten(old), flatten(new)
    keys = sorted(a.keys() | b.keys())
    pairs = {k: (a.get(k, MISSING), b.get(k, MISSING)) for k in keys}
    return {k: (x, y) for k, (x, y) in pairs.items() if x is MISSING or y is MISSING or x != y}


def describe_difference(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns one line per entry of `difference`."""
    shown = lambda v: "(absent)" if v is MISSING else repr(v)
    return "\n".join(f"  {key}: {shown(a)} -> {shown(b)}" for key, (a, b) in differences.items())


# --- loading and overriding ----------------------------------------------------------------------


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
            "--config is empty: give a file or one of " + _listing(shipped_experiments())
        )
    name, _, argument = reference.partition(":")
    path = _find(name)
    if path.suffix == ".json":
        return from_json(path.read_text(), str(path)), path
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
    except Exception as error:
        raise UserError(
            f"{path}: get_config({argument!r}) failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(config, ConfigDict | FrozenConfigDict | Mapping):
        raise UserError(f"{path}: get_config() gave {type(config).__name__}, not a ConfigDict")
    return ConfigDict(thaw(config)), path


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
        f"{_nearest(name, shipped)}: one of {_listing(shipped)}"
    )


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets the dotted `key` of `config` from a command line's text.

    The text is read as a Python literal (`1e-3`, `True`, `(0, 1)`, `0,1,2`), and as a string where
    it is none, or where the config has a string there. A key that the file doesn't set may be
    given: `resolve` checks it.

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
    if isinstance(current, ConfigDict):
        raise UserError(
            f"--config.{key}={text}: {key} is a block; set one of "
            + _listing(f"{key}.{k}" for k in current)
        )
    value = text if isinstance(current, str) else _literal(text)
    if isinstance(current, tuple) and not isinstance(value, tuple):
        value = (value,)
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
