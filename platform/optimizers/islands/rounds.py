"""Methods in which islands train alone for many steps, and then meet: DiLoCo and local SGD."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lamina.platform.errors import UserError
from lamina.platform.optimizers import table
from lamina.platform.optimizers.islands import compression as codes
from lamina.platform.optimizers.islands.method import Rounds, Whole, check_number

NESTEROV: Mapping[str, Any] = MappingProxyType(
    {"name": "sgd", "learning_rate": 0.7, "momentum": 0.9, "nesterov": True}
)
"""DiLoCo's outer optimizer, with the paper's values."""


def diloco(
    whole: Whole,
    *,
    number: int,
    every: int = 500,
    outer: Mapping[str, Any] = NESTEROV,
    compression: codes.Name = "none",
) -> Rounds:
    """DiLoCo: an outer optimizer moves the common parameters once in a round.

    Every H steps, with `x` the common parameters and `x_i` those of island i:
    `d = mean_i(x - x_i)`, which the outer optimizer takes for a gradient at `x`, and all `x_i`
    become the new `x`. With Nesterov's momentum: `b <- m b + d`, `x <- x - a (d + m b)`. The
    islands' own optimizers (`config.optimizer`) are neither reset nor exchanged.

    The codes of `compression` are the simplest that bound the error: int8 has one scale for each
    output channel, where the code book of INTELLECT-1 (arXiv 2412.01152) has one of 256 averages.

    Args:
        whole: sends an array to all islands.
        number: of islands; they divide the batch.
        every: H, steps of a round (default: the paper's).
        outer: an optimizer's name and keys (default: the paper's; 0.7, 0.9); without a name, keys
            of the default to change.
        compression: of the differences d.

    Raises:
        ValueError: there is no island, or a round has no step.
        UserError: the outer optimizer refuses its keys.

    References:
        Douillard et al. 2023, DiLoCo: Distributed Low-Communication Training of Language Models,
        https://arxiv.org/abs/2311.08105
    """
    keys = dict(outer) if "name" in outer else {**NESTEROV, **outer}
    if "learning_rate" not in keys:
        raise UserError("islands.outer.learning_rate is missing")
    try:
        name = keys.pop("name")
        transformation = table.create(name, keys.pop("learning_rate"), **keys)
    except UserError as error:
        raise UserError(f"islands.outer: {error}") from error
    _check_outer(transformation, name)
    return _rounds(whole, number, every, transformation, compression)


def local_sgd(
    whole: Whole, *, number: int, every: int = 8, compression: codes.Name = "none"
) -> Rounds:
    """Local SGD, or federated averaging: the islands' parameters are averaged once in a round.

    It is DiLoCo with plain descent at rate 1. Any `config.optimizer` may train the islands; its
    state is not averaged.

    Args:
        whole: sends an array to all islands.
        number: of islands; they divide the batch.
        every: steps of a round (default: where the paper's speed-up is largest on one machine).
        compression: of the differences between the common parameters and the islands'.

    Raises:
        ValueError: there is no island, or a round has no step.

    References:
        Stich 2018, Local SGD Converges Fast and Communicates Little,
        https://arxiv.org/abs/1805.09767; McMahan et al. 2016, https://arxiv.org/abs/1602.05629
    """
    return _rounds(whole, number, every, optax.sgd(1.0), compression)


def _check_outer(outer: optax.GradientTransformation, name: Any) -> None:
    """Refuses an optimizer that asks for more than gradients and parameters."""
    kernel = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    try:
        jax.eval_shape(lambda x: outer.update(x, outer.init(x), x), kernel)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"islands.outer.name = {name!r} asks for the loss, which isn't known where islands "
            "meet: take an optimizer of gradients alone, such as 'sgd'"
        ) from error


def _rounds(
    whole: Whole,
    number: int,
    every: int,
    outer: optax.GradientTransformation,
    compression: codes.Name,
) -> Rounds:
    check_number(number)
    if every < 1:
        raise ValueError(f"every = {every} should be at least 1 step")
    return Rounds(number, every, outer, codes.average(compression, whole), codes.size(compression))
