"""What schedules are made of: warm-up, progress, and checks that traced numbers pass."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.errors import UserError

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
"""Step to the factor of the peak learning rate."""

Number = Any  # int or float, or a traced scalar


def real(step: jax.typing.ArrayLike) -> jax.Array:
    """Returns a step as float32."""
    return jnp.asarray(step).astype(jnp.float32)


def warmup(step: jax.typing.ArrayLike, warmup_steps: Number) -> jax.Array:
    """Returns (step + 1) / warmup_steps, at most 1."""
    return jnp.minimum((real(step) + 1) / jnp.maximum(warmup_steps, 1), 1.0)


def progress(step: jax.typing.ArrayLike, start: Number, length: Number) -> jax.Array:
    """Returns (step - start) / length within [0, 1]; the difference is taken in integers."""
    passed = jnp.clip(jnp.asarray(step) - start, 0, length)
    return passed.astype(jnp.float32) / jnp.maximum(length, 1)


def share(fraction: Number, steps: int) -> Number:
    """Returns a share of the steps, rounded."""
    if isinstance(fraction, jax.Array):
        return jnp.round(fraction * steps).astype(jnp.int32)
    return round(fraction * steps)


def steps_after_warmup(steps: int, warmup_steps: Number) -> Number:
    """Returns the steps that are left for the decay; a run may also end within its warm-up."""
    check(warmup_steps >= 0, f"warmup_steps = {warmup_steps} should not be negative")
    if isinstance(warmup_steps, jax.Array):
        return jnp.maximum(steps - warmup_steps, 0)
    return max(steps - warmup_steps, 0)


def check(condition: bool | jax.Array, message: str) -> None:
    """Refuses a mistake; what depends on a traced number can't be looked at.

    Raises:
        UserError: the condition is known and False; `message` says what is wrong.
    """
    if not isinstance(condition, jax.Array) and not condition:
        raise UserError(f"schedule: {message}")


def check_factors(**factors: Number) -> None:
    """Refuses factors of the peak that are negative or no numbers, by their names."""
    for name, factor in factors.items():
        known = isinstance(factor, int | float | np.number) and math.isfinite(factor)
        good = isinstance(factor, jax.Array) or (known and bool(factor >= 0))
        check(good, f"{name} = {factor!r} should be a number, 0 or more")


def check_boundaries(boundaries: tuple[int, ...], last: float = math.inf) -> None:
    """Refuses steps that don't increase from 1 on, to below `last`."""
    whole = all(isinstance(s, int | np.integer) and not isinstance(s, bool) for s in boundaries)
    good = whole and all(a < b for a, b in itertools.pairwise((0, *boundaries, last)))
    within = f"above 0 and below the {last} steps" if last < math.inf else "above 0"
    check(good, f"boundaries = {boundaries!r} should be increasing whole numbers, {within}")
