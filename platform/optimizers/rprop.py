"""Rprop: step sizes that grow while a gradient keeps its sign, for full batches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class RpropState(NamedTuple):
    """State of `rprop`.

    Attributes:
        sizes: the step size of each weight.
        previous: the gradient before, 0 where it changed its sign.
    """

    sizes: Any
    previous: Any


def first_rate(learning_rate: optax.ScalarOrSchedule) -> Any:
    """Returns the learning rate of the first step."""
    return learning_rate(jnp.zeros((), jnp.int32)) if callable(learning_rate) else learning_rate


def adapted_sizes(sizes, agreement, eta_minus, eta_plus, smallest, largest):
    """Returns the step sizes, larger where `agreement` is positive and smaller where negative."""
    factor = jnp.where(agreement > 0, eta_plus, jnp.where(agreement < 0, eta_minus, 1.0))
    return jnp.clip(sizes * factor, smallest, largest).astype(sizes.dtype)


def check_bounds(smallest: Any, largest: Any) -> None:
    """Refuses bounds that leave no step size between them; traced ones pass.

    Raises:
        ValueError: says which.
    """
    plain = isinstance(smallest, int | float) and isinstance(largest, int | float)
    if plain and smallest > largest:
        raise ValueError(f"step_size_min = {smallest} exceeds step_size_max = {largest}")


def rprop(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eta_minus: float = 0.5,
    eta_plus: float = 1.2,
    step_size_min: float = 1e-6,
    step_size_max: float = 50.0,
) -> optax.GradientTransformation:
    """Rprop: `theta <- theta - s sign(g)` with a step size s for each weight; for full batches.

    s grows by `eta_plus` where the gradient keeps its sign, and shrinks by `eta_minus` where it
    changes; there the weight rests for a step, and s for another (Rprop- with the gradient set to
    0, as in PyTorch). Every update is applied at once; that of optax.rprop (0.2.8) comes one step
    late, and its first is 0.

    Args:
        learning_rate: the first step size. The method adapts them itself: a schedule's later values
            have no effect, so use the schedule "constant".
        eta_minus: factor after a change of sign (default: the paper's, as all below).
        eta_plus: factor where the sign stays.
        step_size_min: smallest step size.
        step_size_max: largest step size.

    Raises:
        ValueError: the smallest step size exceeds the largest.

    References:
        Riedmiller and Braun, A Direct Adaptive Method for Faster Backpropagation Learning: The
        RPROP Algorithm, ICNN 1993
    """
    check_bounds(step_size_min, step_size_max)

    def init(params):
        rate = first_rate(learning_rate)
        return RpropState(optax.tree.full_like(params, rate), optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        agreement = jax.tree.map(jnp.multiply, updates, state.previous)
        grads = jax.tree.map(lambda g, a: jnp.where(a < 0, 0, g), updates, agreement)
        sizes = jax.tree.map(
            lambda s, a: adapted_sizes(s, a, eta_minus, eta_plus, step_size_min, step_size_max),
            state.sizes,
            agreement,
        )
        steps = jax.tree.map(lambda s, g: -s * jnp.sign(g), sizes, grads)
        return steps, RpropState(sizes, grads)

    return optax.GradientTransformation(init, update)
