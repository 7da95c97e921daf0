"""Configs against signatures: filling in defaults, finding every mistake, calling factories."""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from lamina.platform.config import names, plain
from lamina.platform.config.plain import MISSING, thaw
from lamina.platform.errors import UserError

EVERYONE = ("*",)
"""Trust for configs that the user wrote as Python: any `module:factory` name may be imported."""

_TRUSTED: ContextVar[Sequence[str]] = ContextVar("trusted", default=EVERYONE)
"""What the config is trusted with whose factory is being called: it may look up names itself."""


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
        default: the name where a config has no such block; "" if it must have one.
        takes: the positional parameters that the platform supplies, for messages.
        makes: the type, or a tuple of types, of what a factory returns.
    """

    table: Mapping[str, Callable]
    options: Callable[[Any], dict[str, Option]] = options
    shared: type | None = None
    default: str = ""
    takes: str = ""
    makes: Any = object


class NoSettings(NamedTuple):
    """No plain keys."""


class Schema(NamedTuple):
    """The vocabulary of one program's config.

    Attributes:
        settings: a `NamedTuple` class whose fields are the plain top-level keys.
        blocks: key to a factory or `NamedTuple` class, for blocks without a name.
        kinds: key to `Kind`, for named blocks.
        contradictions: what is wrong between keys whose types are right, a sentence each.
    """

    settings: type
    blocks: Mapping[str, Callable]
    kinds: Mapping[str, Kind]
    contradictions: Callable[[FrozenConfigDict], Iterable[str]] = lambda config: ()


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
        UserError: lists all unknown, missing and mistyped keys, with the nearest valid names, and
            all contradictions.
    """
    problems = list(plain.not_plain(config, ""))
    if problems:
        raise plain.mistakes(problems)
    resolved: dict[str, Any] = {}
    settings = options(schema.settings)
    known = [*settings, *schema.blocks, *schema.kinds]
    for key in config:
        if key not in known:
            problems.append(_unknown(key, known))
    given = {k: v for k, v in config.items() if k in settings}
    whole = _bind(given, settings, "", resolved, problems)
    for key, factory in schema.blocks.items():
        block = _block(config, key, problems)
        resolved[key] = {}
        whole &= _bind(block, options(factory), f"{key}.", resolved[key], problems)
    for key, kind in schema.kinds.items():
        block = _block(config, key, problems)
        resolved[key] = {}
        whole &= _bind_named(block, key, kind, trust, resolved[key], problems)
    frozen = FrozenConfigDict(resolved)
    if whole:  # a mistyped key with a default stands at its default there
        problems += schema.contradictions(frozen)
    if problems:
        raise plain.mistakes(problems)
    return frozen


def _bind_named(
    block: Mapping, key: str, kind: Kind, trust: Sequence[str], into: dict, problems: list[str]
) -> bool:
    """As `_bind`, for a block whose keys are those of the factory that its name stands for."""
    name = block.get("name") if block else kind.default
    if not isinstance(name, str) or not name:
        problems.append(f"{key}.name is missing: one of {names.listing(kind.table)}")
        return False
    try:
        keys = dict(kind.options(lookup(name, kind.table, key, trust)))
    except UserError as error:
        problems.append(str(error))
        return False
    if kind.shared is not None:
        keys = options(kind.shared) | keys
    into["name"] = name
    given = {k: v for k, v in block.items() if k != "name"}
    return _bind(given, keys, f"{key}.", into, problems)


def drop_foreign(
    block: ConfigDict, kind: Kind, key: str, trust: Sequence[str], given: Collection[str]
) -> None:
    """Takes from a block, whose name has changed, the keys that only the old name had.

    Args:
        block: the block with its new name; it is changed.
        kind: its kind.
        key: where it stands in the config.
        trust: as in `resolve`.
        given: keys that stay, so that a mistake in them is reported.

    Raises:
        UserError: as `lookup`.
    """
    known = kind.options(lookup(block["name"], kind.table, key, trust))
    shared = options(kind.shared) if kind.shared is not None else {}
    with block.unlocked():
        for foreign in set(block) - {"name", *known, *shared, *given}:
            del block[foreign]


def lookup(name: str, table: Mapping[str, Callable], kind: str, trust: Sequence[str]) -> Callable:
    """Returns the factory called `name`: a table's entry, or the user's `"package.module:factory"`.

    While `build` calls a factory, nothing is trusted that the factory's own config isn't: the names
    in it (the links of a chain of learners) are as much somebody's data.

    Raises:
        UserError: the name is neither in the table nor importable, or its package isn't trusted.
    """
    if not isinstance(name, str):
        raise UserError(f"{kind}.name = {name!r} should be text, such as {next(iter(table))!r}")
    if "," in name:
        raise UserError(
            f"{kind}.name = {name!r} should be one name; a sweep tries several: "
            f"sweep.space.{kind}.name = {names.split(name)}"
        )
    if ":" not in name:
        if name not in table:
            raise UserError(
                f"{kind}.name = {name!r} is unknown{names.nearest(name, table)}: "
                f"one of {names.listing(table)}, or 'package.module:factory'"
            )
        return table[name]
    module_name, _, attribute = name.partition(":")
    package = module_name.partition(".")[0]
    allowed = _TRUSTED.get() if tuple(trust) == EVERYONE else trust
    if tuple(allowed) != EVERYONE and package not in allowed:
        raise UserError(
            f"{kind}.name = {name!r} would import somebody's code: "
            f"pass --trust={package} if you trust that package"
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{kind}.name = {name!r} cannot be imported: {error}") from error
    if not callable(factory):
        raise UserError(f"{kind}.name = {name!r} is {type(factory).__name__}, not a function")
    return factory


def build(block: Mapping, kind: Kind, key: str, trust: Sequence[str], *supplied: Any) -> Any:
    """Calls the factory that a resolved, named block stands for.

    Args:
        block: the resolved block, with its `name`.
        kind: its kind.
        key: where it stands in the config, for messages.
        trust: as in `resolve`.
        *supplied: the factory's positional arguments (keys, data spec, dtype).

    Raises:
        UserError: the factory refused its arguments (a `ValueError`, with its message), takes
            others, or returned something else than its kind should.
    """
    factory = lookup(block["name"], kind.table, key, trust)
    keys = kind.options(factory)
    arguments = {k: thaw(v) for k, v in block.items() if k in keys}
    where = f"{key} ({block['name']})"
    check_call(where, factory, kind.takes, *supplied, **arguments)
    outer = _TRUSTED.set(_TRUSTED.get() if tuple(trust) == EVERYONE else trust)
    try:
        made = factory(*supplied, **arguments)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    finally:
        _TRUSTED.reset(outer)
    if not isinstance(made, kind.makes):
        wanted = _type_names(kind.makes)
        raise UserError(f"{where}: the factory returns a {type(made).__name__}, not a {wanted}")
    return made


def check_call(where: str, factory: Callable, takes: str, *supplied: Any, **keys: Any) -> None:
    """Checks that a factory's signature fits the arguments that it is about to be called with.

    A `TypeError` of the call itself could as well come from inside the factory, as its bug.

    Raises:
        UserError: it doesn't fit.
    """
    try:
        inspect.signature(factory).bind(*supplied, **keys)
    except TypeError as error:
        signature = ", ".join(filter(None, (takes, "*, keys of the config")))
        raise UserError(f"{where}: {error}; a factory takes ({signature})") from error


def _block(config, key: str, problems: list[str]) -> Mapping[str, Any]:
    block = thaw(config.get(key, {}))
    if isinstance(block, dict):
        return block
    problems.append(f"{key} = {block!r} should be a block of keys, such as {key}=dict(...)")
    return {}


def _bind(
    given: Mapping, keys: Mapping[str, Option], prefix: str, into: dict, problems: list[str]
) -> bool:
    """Puts the value or the default of every key into `into`, and what is wrong into `problems`.

    Returns:
        Whether every key has got a value of its type.
    """
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
            hint = names.separated(value) if "tuple" in str(option.type) else ""
            problems.append(f"{prefix}{key} = {value!r} should be {_type_name(option.type)}{hint}")
            if option.default is not MISSING:
                into[key] = thaw(option.default)
    return into.keys() >= keys.keys()


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
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, typing.get_args(wanted)))
    if typing.get_origin(wanted) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(wanted)))
    if _is_block(wanted):
        return "a block of keys"
    if isinstance(wanted, type) and typing.get_origin(wanted) is None:
        article = "an" if wanted.__name__[0] in "aeiou" else "a"
        return f"{article} {wanted.__name__}"
    return str(wanted).replace("typing.", "")


def _type_names(types: Any) -> str:
    return " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))


def _unknown(key: str, known, prefix: str = "") -> str:
    return (
        f"{prefix}{key} is not a key{names.nearest(key, known)}: valid are {names.listing(known)}"
    )
