"""How keys are bound to the parameters of an optimizer's factory: names, types and ranges.

A factory takes the learning rate first and returns an optax gradient transformation. Its other
parameters are the config's keys where their type is plain: numbers, strings, booleans, tuples. A
config holds no None, so where a factory takes "a number or None", 0 stands for None (that is: off,
or the library's own choice), and for data types the empty string does.
"""

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lamina.platform.config import MISSING, Option
from lamina.platform.config.names import listing, nearest
from lamina.platform.errors import UserError

NOT_KEYS = ("dimension_numbers", "learning_rate", "mask", "print_win_rate_every_n_steps", "verbose")
"""Parameters (by the end of their name) that are no config keys although a number would do: choices
per leaf, second learning rates that the schedule would not reach, and printing from the step."""


class Range(NamedTuple):
    """An interval that is open at its upper end, and at its lower end if `above`."""

    low: float
    high: float
    above: bool = False

    def holds(self, value: float) -> bool:
        """Returns whether the value lies inside; NaN does not."""
        return (self.low < value if self.above else self.low <= value) and value < self.high

    def __str__(self) -> str:
        return f"{'(' if self.above else '['}{self.low:g}, {self.high:g})"


SHARE = Range(0, 1)
POSITIVE = Range(0, math.inf, above=True)
NOT_NEGATIVE = Range(0, math.inf)

RANGES: Mapping[str, Range] = {
    **dict.fromkeys(
        ("adam_b1", "adam_b2", "b1", "b2", "b3", "beta1_a", "beta1_b", "beta2", "beta3", "betas"),
        SHARE,
    ),
    **dict.fromkeys(("decay", "frozen", "momentum", "rho", "shampoo_beta"), SHARE),
    **dict.fromkeys(("eps", "eps_root", "r", "score_history", "warmup_steps"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_weight_decay", "weight_decay", "weight_decay_rate"), NOT_NEGATIVE),
    **dict.fromkeys(("learning_rate", "learning_rate_factor"), NOT_NEGATIVE),
    **dict.fromkeys(("beta1_c", "max_dim", "memory_size", "ns_steps", "rank"), POSITIVE),
    **dict.fromkeys(("precondition_every", "step_size_max", "step_size_min"), POSITIVE),
    **dict.fromkeys(("adam_eps", "adam_factor", "alpha", "beta", "eta", "gamma"), NOT_NEGATIVE),
    **dict.fromkeys(("clip_threshold", "clipping_threshold", "threshold"), NOT_NEGATIVE),
    **dict.fromkeys(("init_estim_sq_dist", "initial_accumulator_value"), NOT_NEGATIVE),
    **dict.fromkeys(("initial_scale", "min_dim_size_to_factor", "min_norm"), NOT_NEGATIVE),
    **dict.fromkeys(("estim_lr0", "trust_coefficient"), POSITIVE),
    **dict.fromkeys(("update_interval", "update_proj_gap"), POSITIVE),
    "eta_minus": Range(0, 1, above=True),
    "eta_plus": Range(1, math.inf),
}
"""Key to the values that make sense, for every optimizer of the table. Traced numbers pass."""


def in_range(label: str, key: str, value: Any) -> None:
    """Refuses a number outside the range of its key, and what is not a number for any key.

    Raises:
        UserError: names the range.
    """
    allowed = RANGES.get(key)
    for number in value if isinstance(value, tuple) else (value,):
        if not is_number(number) or isinstance(number, Tracer):
            continue
        if math.isnan(number) or (allowed and not allowed.holds(float(number))):
            wanted = f"lie in {allowed}" if allowed else "be a number"
            raise UserError(f"optimizer {label!r}: {key} = {value!r} should {wanted}")


def same_form(label: str, key: str, value: Any, default: Any) -> None:
    """Refuses a tuple that isn't as long as the default, or that has text for a number.

    Raises:
        UserError: shows the default.
    """
    if not isinstance(default, tuple):
        return
    alike = lambda v, d: isinstance(v, str) == isinstance(d, str)
    if len(value) != len(default) or not all(map(alike, value, default)):
        raise UserError(f"optimizer {label!r}: {key} = {value!r} should look like {default!r}")


def keys(factory: Callable) -> dict[str, tuple[Option, bool]]:
    """Returns key to (option, whether "off" stands for None) of the plain parameters."""
    try:
        parameters = inspect.signature(factory, eval_str=True).parameters
    except NameError:  # annotations that exist for type checkers only
        parameters = inspect.signature(factory).parameters
    found = {}
    for parameter in list(parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        key = _plain(parameter)
        if key is not None and not parameter.name.endswith(NOT_KEYS):
            found[parameter.name] = key
    return found


def _plain(parameter: inspect.Parameter) -> tuple[Option, bool] | None:
    """Returns the option that a parameter is, or None if its type isn't plain."""
    default, annotation = parameter.default, parameter.annotation
    choices = _alternatives(annotation)
    optional = default is None or type(None) in choices
    if "dtype" in parameter.name.split("_"):
        return Option(str, "" if default is None else np.dtype(default).name), default is None
    if typing.get_origin(annotation) is typing.Literal:
        return Option(annotation, default), False
    if default is None or default is MISSING:
        kinds = [kind for kind in (float, int, str) if kind in choices]
        if not kinds:
            return None
        return Option(kinds[0], kinds[0]() if default is None else MISSING), optional
    if annotation in (bool, int, float, str):
        return Option(annotation, annotation(default)), False
    if isinstance(default, bool | int | float | str):
        return Option(type(default), default), optional and not isinstance(default, bool | str)
    if _is_plain_tuple(default):
        return Option(tuple, default), False
    return None


def _alternatives(annotation: Any) -> set:
    """Returns the types that a (nested) union allows."""
    arguments = typing.get_args(annotation)
    if not arguments:
        return {annotation} if isinstance(annotation, type) else set()
    if typing.get_origin(annotation) in (typing.Union, type(int | str)):
        return set().union(*map(_alternatives, arguments))
    return set()


def _is_plain_tuple(value: Any) -> bool:
    plain = lambda v: isinstance(v, bool | int | float | str) or _is_plain_tuple(v)
    return isinstance(value, tuple) and all(map(plain, value))


def checked(label: str, key: str, value: Any, wanted: Any) -> Any:
    """Returns `value` as type `wanted`; arrays of no dimension pass as numbers, ints as floats.

    Raises:
        UserError: the value isn't of that type.
    """
    choices = typing.get_args(wanted)
    if choices:
        if value in choices:
            return value
        expected = "one of " + ", ".join(map(repr, choices))
        raise UserError(f"optimizer {label!r}: {key} = {value!r} should be {expected}")
    if wanted in (int, float) and is_number(value, wanted):
        return float(value) if wanted is float and isinstance(value, int) else value
    if "dtype" in key.split("_"):
        return _dtype_name(label, key, value)
    if wanted in (bool, str) and isinstance(value, wanted):
        return value
    if wanted is tuple and isinstance(value, list):
        value = tuple(value)
    if wanted is tuple and _is_plain_tuple(value):
        return value
    article = "an" if wanted is int else "a"
    raise UserError(f"optimizer {label!r}: {key} = {value!r} should be {article} {wanted.__name__}")


def is_number(value: Any, wanted: type = float) -> bool:
    """Returns whether a value is one real number, plain or an array; a whole one for `int`."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        kinds = (jnp.integer,) if wanted is int else (jnp.integer, jnp.floating)
        return value.ndim == 0 and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    return isinstance(value, int if wanted is int else int | float) and not isinstance(value, bool)


def _dtype_name(label: str, key: str, value: Any) -> str:
    if isinstance(value, str) and not value:
        return value
    try:
        found = jnp.dtype(value)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise UserError(
            f"optimizer {label!r}: {key} = {value!r} should name a data type of floats, such "
            "as 'bfloat16'"
        )
    return found.name


def is_off(value: Any) -> bool:
    """Returns whether a value stands for None, where a factory takes None."""
    return isinstance(value, int | float | str) and not value


def is_mask(factory: Callable, key: str, value: Any) -> bool:
    """Returns whether this is a mask for the factory: a tree or function, which no config holds."""
    if not key.endswith("mask") or isinstance(value, bool | int | float | str):
        return False
    return key in inspect.signature(factory).parameters


def unknown(label: str, key: str, known: list[str]) -> UserError:
    """Returns the error of a key that the factory doesn't have."""
    return UserError(
        f"optimizer {label!r}: {key} is not a key{nearest(key, known)}: valid are {listing(known)}"
    )
