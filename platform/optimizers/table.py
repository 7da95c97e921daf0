"""The table of optimizers, and how a config's keys are bound to their signatures.

A factory takes the learning rate first and returns an optax gradient transformation. Its other
parameters are the config's keys where their type is plain: numbers, strings, booleans, tuples. A
config holds no None, so where a factory takes "a number or None", 0 stands for None (that is: off,
or the library's own choice), and for data types the empty string does.
"""

import difflib
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from lamina.platform.config import MISSING, Option, lookup
from lamina.platform.errors import UserError
from lamina.platform.optimizers import adapted

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "acprop": contrib.acprop,
    "adabelief": optax.adabelief,
    "adadelta": optax.adadelta,
    "adafactor": optax.adafactor,
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "adamax": optax.adamax,
    "adamaxw": optax.adamaxw,
    "adamw": optax.adamw,
    "adan": optax.adan,
    "ademamix": adapted.ademamix,
    "adopt": contrib.adopt,
    "amsgrad": optax.amsgrad,
    "cocob": contrib.cocob,
    "dadapt_adamw": contrib.dadapt_adamw,
    "dog": contrib.dog,
    "dowg": contrib.dowg,
    "fromage": optax.fromage,
    "galore": contrib.galore,
    "lamb": optax.lamb,
    "lars": optax.lars,
    "lbfgs": adapted.lbfgs,
    "lion": optax.lion,
    "madgrad": contrib.madgrad,
    "momo": contrib.momo,
    "momo_adam": contrib.momo_adam,
    "muon": contrib.muon,
    "nadam": optax.nadam,
    "nadamw": optax.nadamw,
    "noisy_sgd": adapted.noisy_sgd,
    "novograd": optax.novograd,
    "optimistic_adam": optax.optimistic_adam_v2,
    "optimistic_gradient_descent": optax.optimistic_gradient_descent,
    "polyak_sgd": adapted.polyak_sgd,
    "prodigy": contrib.prodigy,
    "radam": optax.radam,
    "rmsprop": optax.rmsprop,
    "schedule_free_adamw": adapted.schedule_free_adamw,
    "schedule_free_sgd": adapted.schedule_free_sgd,
    "sgd": optax.sgd,
    "sign_sgd": optax.sign_sgd,
    "signum": optax.signum,
    "simplified_ademamix": contrib.simplified_ademamix,
    "sm3": adapted.sm3,
    "sophia": adapted.sophia,
    "yogi": optax.yogi,
}
"""Name to factory. Not here: optax.rprop (optax 0.2.8 applies every update one step late), dpsgd
(needs gradients per example), sam (needs a second gradient in the step)."""

CONVENTIONS = {
    "amsgrad": "maximum of the bias-corrected second moment; the paper's form is "
    "bias_correction_nu=False, and PyTorch's is neither",
    "nadam": "without the momentum-decay schedule of PyTorch's NAdam",
    "nadamw": "without the momentum-decay schedule of PyTorch's NAdam",
    "muon": "bias-corrected momentum, scaled by sqrt(max(1, fan_out/fan_in)); matrices only, "
    "all other parameters (convolutions too) by Adam; the original has no bias correction",
    "prodigy": "prodigyopt with use_bias_correction=True",
    "radam": "equals PyTorch's up to the place of eps",
    "schedule_free_adamw": "equals the authors' code, warm-up included (their r = 0)",
    "schedule_free_sgd": "equals the authors' code, warm-up included (their r = 0)",
    "sgd": "momentum as in PyTorch: the first buffer is the gradient itself",
    "sophia": "Hutchinson's estimate with random signs (Sophia-H)",
}
"""Which convention an optimizer follows, where implementations of the same name differ."""

NOT_KEYS = ("dimension_numbers", "learning_rate", "mask", "print_win_rate_every_n_steps", "verbose")
"""Parameters (by the end of their name) that are no config keys although a number would do: choices
per leaf, second learning rates that the schedule would not reach, and printing from the step."""


def options(name: str | Callable) -> dict[str, Option]:
    """Returns the config keys of an optimizer, `learning_rate` excepted.

    Args:
        name: a name in `OPTIMIZERS`, or a factory.

    Returns:
        Key to (type, default).

    Raises:
        UserError: the name is unknown.

    >>> options("sgd")["momentum"]
    Option(type=<class 'float'>, default=0.0)
    """
    return {key: option for key, (option, _) in _keys(_factory(name)).items()}


def create(
    name: str | Callable,
    learning_rate: optax.ScalarOrSchedule,
    **keys: Any,
) -> optax.GradientTransformationExtraArgs:
    """Creates an optimizer.

    Args:
        name: a name in `OPTIMIZERS`, or a factory whose first parameter is the learning rate.
        learning_rate: a number, or a function of the number of updates before this one.
        **keys: see `options`; numbers may be (traced) arrays.

    Returns:
        The optimizer; `update` takes `value`, `grad`, `value_fn` and `metrics`, and ignores what it
        doesn't need. Create its state under `jit`: outside, some states alias the parameters.

    Raises:
        UserError: unknown name or key, mistyped or refused value.

    >>> optimizer = create("adamw", 1e-3, weight_decay=0.1)
    """
    factory, label = _factory(name), _label(name)
    known = _keys(factory)
    arguments = {}
    for key, value in keys.items():
        if key not in known:
            raise UserError(_unknown(label, key, list(known)))
        option, optional = known[key]
        value = _checked(label, key, value, option.type)
        arguments[key] = None if optional and _is_off(value) else value
    missing = [k for k, (o, _) in known.items() if o.default is MISSING and k not in arguments]
    if missing:
        raise UserError(f"optimizer {label!r}: {', '.join(missing)} must be given")
    try:
        return optax.with_extra_args_support(factory(learning_rate, **arguments))
    except ValueError as error:
        raise UserError(f"optimizer {label!r}: {error}") from error


def _factory(name: str | Callable) -> Callable:
    return name if callable(name) else lookup(name, OPTIMIZERS, "optimizer", ())


def _label(name: str | Callable) -> str:
    return name if isinstance(name, str) else getattr(name, "__name__", repr(name))


def _keys(factory: Callable) -> dict[str, tuple[Option, bool]]:
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


def _checked(label: str, key: str, value: Any, wanted: Any) -> Any:
    """Returns `value` as type `wanted`; arrays pass as numbers, ints as floats."""
    choices = typing.get_args(wanted)
    if choices:
        if value in choices:
            return value
        expected = "one of " + ", ".join(map(repr, choices))
        raise UserError(f"optimizer {label!r}: {key} = {value!r} should be {expected}")
    if wanted in (int, float) and isinstance(value, jax.Array | np.ndarray | np.number):
        return value
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if wanted is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if "dtype" in key.split("_") and isinstance(value, str):
        return _dtype_name(label, key, value)
    if wanted in (bool, str) and isinstance(value, wanted):
        return value
    if wanted is tuple and _is_plain_tuple(value):
        return value
    article = "an" if wanted is int else "a"
    raise UserError(f"optimizer {label!r}: {key} = {value!r} should be {article} {wanted.__name__}")


def _dtype_name(label: str, key: str, value: str) -> str:
    try:
        return jnp.dtype(value).name if value else value
    except TypeError as error:
        raise UserError(
            f"optimizer {label!r}: {key} = {value!r} should name a data type, such as 'bfloat16'"
        ) from error


def _is_off(value: Any) -> bool:
    return isinstance(value, int | float | str) and not value


def _unknown(label: str, key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"optimizer {label!r}: {key} is not a key{hint}: valid are {', '.join(sorted(known))}"
