"""Dynamic loss scaling, which keeps float16 gradients from vanishing.

One step: the gradients of `state.scale * loss` divided by `state.scale`,
`finite = all_finite(grads)`, then `keep(finite, after, before)` for the parameters and the
optimizer's state, and `state = update(state, finite)`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class LossScale(NamedTuple):
    """State of the loss scaling.

    Attributes:
        scale: factor of the loss, float32, a power of two so that scaling is exact.
        good_steps: steps without overflow since the scale last changed, int32.
    """

    scale: jax.Array
    good_steps: jax.Array


def init(initial: float = 2.0**15) -> LossScale:
    """Returns the first state.

    Args:
        initial: the first scale; the default, 2^15, is the reference implementation's.

    References:
        Micikevicius et al., Mixed Precision Training, https://arxiv.org/abs/1710.03740
    """
    return LossScale(jnp.float32(initial), jnp.int32(0))


def all_finite(tree: Any) -> jax.Array:
    """Returns whether every number in the tree is finite, a boolean scalar."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.bool_(True)


def keep(finite: jax.Array, after: Any, before: Any) -> Any:
    """Returns `after` where the step was finite, else `before`: an overflow skips the update."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)


def update(
    state: LossScale,
    finite: jax.Array,
    *,
    interval: int = 2000,
    smallest: float = 1.0,
    largest: float = 2.0**24,
) -> LossScale:
    """Returns the next state: twice the scale after `interval` good steps, half after an overflow.

    Args:
        state: the state in the step.
        finite: whether the step's gradients were finite, a boolean scalar.
        interval: good steps before the scale grows (default: the reference implementation's).
        smallest: the scale doesn't fall below this.
        largest: nor grow above this (default: the reference implementation's).

    References:
        Micikevicius et al., Mixed Precision Training, https://arxiv.org/abs/1710.03740
    """
    good_steps = jnp.where(finite, state.good_steps + 1, 0)
    grow = good_steps >= interval
    factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
    return LossScale(
        jnp.clip(state.scale * factor, smallest, largest).astype(jnp.float32),
        jnp.where(grow, 0, good_steps).astype(jnp.int32),
    )
