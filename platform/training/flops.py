"""Counts the floating-point operations of a function from its jaxpr, loops included."""

import math
from collections.abc import Callable
from typing import Any

import jax


def count(function: Callable, *arguments: Any) -> int:
    """Returns the FLOPs of matrix products and convolutions in one call of `function`.

    A multiplication and an addition count as two. Elementwise operations don't count, as in model
    FLOPs of the literature. Bodies of loops with a known length count as often as they run (XLA's
    own analysis counts them once); of a conditional the most expensive branch counts.

    Args:
        function: any traceable function.
        *arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    return count_jaxpr(jax.make_jaxpr(function)(*arguments))


def count_jaxpr(jaxpr: Any) -> int:
    """Returns the same for a closed jaxpr, such as that of `jax.jit(f).trace(...)`."""
    return _count(jaxpr.jaxpr, lambda equation: True)


def count_batched(jaxpr: Any) -> int:
    """Returns the FLOPs of those matrix products that have batch dimensions: attention's."""
    return _count(
        jaxpr.jaxpr,
        lambda equation: (
            equation.primitive.name == "dot_general"
            and bool(equation.params["dimension_numbers"][1][0])
        ),
    )


def _count(jaxpr: Any, counts: Callable[[Any], bool]) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += counts(equation) * _dot(equation)
        elif name == "conv_general_dilated":
            total += counts(equation) * _convolution(equation)
        elif name == "scan":
            total += params["length"] * _count(params["jaxpr"].jaxpr, counts)
        elif name == "cond":
            total += max(_count(branch.jaxpr, counts) for branch in params["branches"])
        else:
            for value in params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(inner, "eqns"):
                        total += _count(inner, counts)
                    elif hasattr(inner, "jaxpr"):
                        total += _count(inner.jaxpr, counts)
    return total


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution(equation: Any) -> int:
    """Every output element takes one product per kernel element and input channel of its group."""
    dimensions = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    out_channels = kernel[dimensions.rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_channels
