"""EXAdam: Adam with debiasing terms that couple the two moments, and a gradient-based push."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class EXAdamState(NamedTuple):
    """State of `scale_by_exadam`.

    Attributes:
        step: int32 []: updates done.
        mu: average of the gradients.
        nu: average of the squared gradients.
    """

    step: jax.Array
    mu: Any
    nu: Any


def scale_by_exadam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns the direction of EXAdam; see `exadam`."""

    def init(params):
        zeros = optax.tree.zeros_like
        return EXAdamState(jnp.zeros((), jnp.int32), zeros(params), zeros(params))

    def update(updates, state, params=None):
        del params
        step = state.step + 1
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        remaining1, remaining2 = b1**step, b2**step

        def direction(g, m, v):
            first = 1 + remaining2 * v / (v + eps)
            second = 1 + remaining1 * m**2 / (m**2 + eps)
            moment, gradient = m * first / (1 - remaining1), g * first / (1 - remaining1)
            scale = v * second / (1 - remaining2)
            return ((moment + gradient) / (jnp.sqrt(scale) + eps)).astype(g.dtype)

        return jax.tree.map(direction, updates, mu, nu), EXAdamState(step, mu, nu)

    return optax.GradientTransformation(init, update)


def exadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """EXAdam: Adam whose moments correct each other's bias, with the current gradient added.

    With Adam's averages m and v at step t = 1, 2, ...:
    `d1 = 1 + b2^t v / (v + eps)`, `d2 = 1 + b1^t m^2 / (m^2 + eps)`,
    `m' = m d1 / (1 - b1^t)`, `g' = g d1 / (1 - b1^t)`, `v' = v d2 / (1 - b2^t)`,
    `theta <- theta - a ((m' + g') / (sqrt(v') + eps) + wd theta)`.
    The first step is about 16 times Adam's, since g' divides the raw gradient by 1 - b1; later ones
    tend to `a (m + g) / sqrt(v)`: warm the learning rate up, or take a smaller one than for Adam.

    The paper's first version also had a step size that grew with log t; version 2 and the author's
    code have none, and neither has this. The weight decay is the code's; the paper has none.

    Args:
        learning_rate: the step size (the paper: 1e-3).
        b1: decay of the average of the gradients (default: the paper's, as all below).
        b2: decay of the average of the squared gradients.
        eps: added to the denominators, also within d1 and d2.
        weight_decay: decoupled weight decay, times the learning rate.

    References:
        Adly, EXAdam: The Power of Adaptive Cross-Moments, https://arxiv.org/abs/2412.20302
    """
    return optax.chain(
        scale_by_exadam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
