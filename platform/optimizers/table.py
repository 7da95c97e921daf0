"""The table of optimizers: name to factory, the conventions they follow, and `create`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax
from optax import contrib

from lamina.platform.config import EVERYONE, MISSING, Option, check_call, lookup
from lamina.platform.errors import UserError
from lamina.platform.optimizers import (
    adapted,
    ademamix,
    binding,
    core,
    exadam,
    mars,
    muon,
    rprop,
    schedule_free,
    soap,
)

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
    "ademamix": ademamix.ademamix,
    "adopt": contrib.adopt,
    "amsgrad": optax.amsgrad,
    "cocob": contrib.cocob,
    "core": core.core,
    "dadapt_adamw": contrib.dadapt_adamw,
    "dog": contrib.dog,
    "dowg": contrib.dowg,
    "exadam": exadam.exadam,
    "fromage": optax.fromage,
    "galore": contrib.galore,
    "lamb": optax.lamb,
    "lars": optax.lars,
    "lbfgs": adapted.lbfgs,
    "lion": optax.lion,
    "madgrad": contrib.madgrad,
    "mars": mars.mars,
    "momo": contrib.momo,
    "momo_adam": contrib.momo_adam,
    "muon": muon.muon,
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
    "rprop": rprop.rprop,
    "schedule_free_adamw": schedule_free.schedule_free_adamw,
    "schedule_free_sgd": schedule_free.schedule_free_sgd,
    "sgd": optax.sgd,
    "sign_sgd": optax.sign_sgd,
    "signum": optax.signum,
    "simplified_ademamix": contrib.simplified_ademamix,
    "sm3": adapted.sm3,
    "soap": soap.soap,
    "sophia": adapted.sophia,
    "yogi": optax.yogi,
}
"""Name to factory. Not here: dpsgd (needs gradients per example), sam (needs a second gradient in
the step)."""

CONVENTIONS = {
    "amsgrad": "maximum of the bias-corrected second moment; the paper's form is "
    "bias_correction_nu=False, and PyTorch's is neither",
    "nadam": "without the momentum-decay schedule of PyTorch's NAdam",
    "nadamw": "without the momentum-decay schedule of PyTorch's NAdam",
    "ademamix": "the paper: the schedules of alpha and b3 count from 1; optax counts from 0",
    "core": "the paper, whose scores always decay after the history; the authors' only with frozen",
    "mars": "the approximate form, clipped per parameter as in the authors' code; vectors too",
    "muon": "the original, without bias correction (optax.contrib.muon has one); equals PyTorch's "
    "but for the iteration, which is in bfloat16 there",
    "prodigy": "prodigyopt with use_bias_correction=True",
    "radam": "equals PyTorch's up to the place of eps",
    "exadam": "version 2 of the paper, and the author's code: no step size that grows with time",
    "rprop": "PyTorch's; optax.rprop applies every update one step late",
    "schedule_free_adamw": "equals the authors' code, warm-up and r included",
    "schedule_free_sgd": "equals the authors' code, warm-up and r included",
    "soap": "the authors' code, but for a weight decay from the parameters before the step",
    "sgd": "momentum as in PyTorch: the first buffer is the gradient itself",
    "sophia": "Hutchinson's estimate with random signs (Sophia-H)",
}
"""Which convention an optimizer follows, where implementations of the same name differ."""


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
    return {key: option for key, (option, _) in binding.keys(_factory(name)).items()}


def off_at_zero(name: str | Callable) -> frozenset[str]:
    """Returns the keys whose 0 stands for None, so that another 0 is no smaller number.

    >>> "momentum" in off_at_zero("sgd")
    True
    """
    factory = name if callable(name) else lookup(name, OPTIMIZERS, "optimizer", EVERYONE)
    return frozenset(key for key, (_, optional) in binding.keys(factory).items() if optional)


def create(
    name: str | Callable,
    learning_rate: optax.ScalarOrSchedule,
    *,
    axes: Mapping[str, tuple[str | None, ...]] | None = None,
    **keys: Any,
) -> optax.GradientTransformationExtraArgs:
    """Creates an optimizer.

    Args:
        name: a name in `OPTIMIZERS`, or a factory whose first parameter is the learning rate.
        learning_rate: a number, or a function of the number of updates before this one.
        axes: path (`a/b/kernel`) to logical axes of the parameters, for methods that see matrices;
            without, all dimensions of an array but the last are rows.
        **keys: see `options`; numbers may be (traced) arrays, and None is what 0 or "" is in a
            config. Masks of the factory, such as adamw's `mask`, are taken as in optax.

    Returns:
        The optimizer; `update` takes `value`, `grad`, `value_fn` and `metrics`, and ignores what it
        doesn't need. Create its state under `jit`: outside, some states alias the parameters.

    Raises:
        UserError: unknown name or key, mistyped value, or one outside its range.

    >>> optimizer = create("adamw", 1e-3, weight_decay=0.1)
    """
    factory, label = _factory(name), _label(name)
    if not callable(learning_rate):
        learning_rate = binding.checked(label, "learning_rate", learning_rate, float)
    if label in OPTIMIZERS:
        binding.in_range(label, "learning_rate", learning_rate)
    known = binding.keys(factory)
    arguments = {}
    for key, value in keys.items():
        if binding.is_mask(factory, key, value):
            arguments[key] = value
            continue
        if key not in known:
            raise binding.unknown(label, key, list(known))
        option, optional = known[key]
        if value is None and optional:
            arguments[key] = None
            continue
        value = binding.checked(label, key, value, option.type)
        if label in OPTIMIZERS:  # what a key of the user's own factory means is not known here
            binding.same_form(label, key, value, option.default)
            binding.in_range(label, key, value)
        arguments[key] = None if optional and binding.is_off(value) else value
    missing = [k for k, (o, _) in known.items() if o.default is MISSING and k not in arguments]
    if missing:
        raise UserError(f"optimizer {label!r}: {', '.join(missing)} must be given")
    if axes is not None and "axes" in inspect.signature(factory).parameters:
        arguments["axes"] = axes
    where = f"optimizer {label!r}"
    check_call(where, factory, "learning_rate", learning_rate, **arguments)
    try:
        made = factory(learning_rate, **arguments)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if not (hasattr(made, "init") and hasattr(made, "update")):
        given = type(made).__name__
        raise UserError(f"{where}: the factory returns a {given}, not a gradient transformation")
    return optax.with_extra_args_support(made)


def _factory(name: str | Callable) -> Callable:
    return name if callable(name) else lookup(name, OPTIMIZERS, "optimizer", ())


def _label(name: str | Callable) -> str:
    return name if isinstance(name, str) else getattr(name, "__name__", repr(name))
