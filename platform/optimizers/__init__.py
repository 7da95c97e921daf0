"""Optimizers and learning-rate schedules by name.

`create` makes any optimizer of the table, `options` lists its keys, and `eval_params` gives the
weights to evaluate. They are imported at first use: this package itself imports nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.platform.optimizers.table import create, options
    from lamina.platform.optimizers.weights import eval_params

__all__ = ["create", "eval_params", "options"]

_HOMES = {"create": "table", "eval_params": "weights", "options": "table"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
