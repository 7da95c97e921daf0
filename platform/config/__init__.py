"""Configs: loading, overriding, checking against signatures, and an exact JSON form.

A config is an `ml_collections.ConfigDict` of plain data. Blocks with a `name` are looked up in a
table of factories; a factory's positional parameters are supplied by the platform, and its
keyword-only parameters are the block's keys. `resolve` fills in defaults from those signatures and
reports every mistake at once; `build` calls the factory.
"""

from lamina.platform.config.loading import load, override, shipped_experiments
from lamina.platform.config.plain import (
    MISSING,
    describe_difference,
    difference,
    flatten,
    from_json,
    thaw,
    to_json,
)
from lamina.platform.config.resolving import (
    EVERYONE,
    Kind,
    NoSettings,
    Option,
    Schema,
    build,
    check_call,
    drop_foreign,
    lookup,
    options,
    resolve,
)

__all__ = [
    "EVERYONE",
    "MISSING",
    "Kind",
    "NoSettings",
    "Option",
    "Schema",
    "build",
    "check_call",
    "describe_difference",
    "difference",
    "drop_foreign",
    "flatten",
    "from_json",
    "load",
    "lookup",
    "options",
    "override",
    "resolve",
    "shipped_experiments",
    "thaw",
    "to_json",
]
