"""The loss on the straight line between two models, and its barrier."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


def interpolate(one: Tree, other: Tree, alpha: Any) -> Tree:
    """Returns `(1 - alpha) one + alpha other`, exactly the ends at 0 and 1.

    Leaves that hold no floating-point numbers are taken from `one`.
    """

    def between(a: Any, b: Any) -> Any:
        a = jnp.asarray(a)
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        share = jnp.asarray(alpha, jnp.promote_types(a.dtype, jnp.float32))
        wide = lambda x: jnp.asarray(x).astype(share.dtype)
        mixed = ((1 - share) * wide(a) + share * wide(b)).astype(a.dtype)
        return jnp.where(
            share == 0, a, jnp.where(share == 1, jnp.asarray(b).astype(a.dtype), mixed)
        )

    return jax.tree.map(between, one, other)


def along(
    evaluate: Callable[[Tree], Any], one: Tree, other: Tree, alphas: Sequence[float]
) -> dict[str, np.ndarray] | np.ndarray:
    """Returns what a function gives along the line between two models: one compiled scan.

    Args:
        evaluate: from parameters to a number, or to a dict of numbers; pure.
        one: the model at 0.
        other: the model at 1.
        alphas: the places.

    Returns:
        The numbers with the places first, on the host.
    """
    run = jax.jit(
        lambda one, other, places: jax.lax.map(
            lambda alpha: evaluate(interpolate(one, other, alpha)), places
        )
    )
    return jax.device_get(run(one, other, jnp.asarray(alphas, jnp.float32)))


def barrier(
    alphas: Sequence[float],
    values: Sequence[float],
    *,
    mode: Literal["min", "max"] = "min",
    ends: Literal["line", "mean"] = "line",
) -> float:
    """Returns the barrier of a loss on the line between two models.

    `max_a [L(a) - ((1 - a) L(0) + a L(1))]` (Frankle et al. 2020, arXiv 1912.05671, and Entezari et
    al. 2021, 2110.06296). With `ends="mean"` what is subtracted is `(L(0) + L(1)) / 2`, as
    Ainsworth et al. 2022 (2209.04836) define it for models of about equal losses, where both are
    the same.

    Args:
        alphas: the places, from 0 to 1.
        values: the loss, or a score, there.
        mode: "max" for a score such as accuracy, whose barrier is how far it falls below the ends.
        ends: what is subtracted.

    Raises:
        ValueError: the places don't begin with 0 and end with 1.

    Example:
        >>> barrier([0.0, 0.5, 1.0], [1.0, 4.0, 2.0])
        2.5
    """
    a, v = np.asarray(alphas, np.float64), np.asarray(values, np.float64)
    if a.shape != v.shape or a.ndim != 1 or len(a) < 2 or a[0] != 0 or a[-1] != 1:
        raise ValueError("a barrier needs a value for each place, the first 0 and the last 1")
    v = -v if mode == "max" else v
    between = (1 - a) * v[0] + a * v[-1] if ends == "line" else (v[0] + v[-1]) / 2
    return float((v - between).max())
