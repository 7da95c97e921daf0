"""MARS: AdamW on gradients whose variance is reduced by the difference to the gradient before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class VarianceReductionState(NamedTuple):
    """State of `reduce_variance`.

    Attributes:
        previous: the gradient before, 0 at first.
    """

    previous: Any


def reduce_variance(gamma: float, b1: float) -> optax.GradientTransformation:
    """Returns `c = g + gamma b1 / (1 - b1) (g - previous)`, each parameter's clipped to norm 1."""

    def init(params):
        return VarianceReductionState(optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params

        def corrected(g, before):
            c = g + gamma * b1 / (1 - b1) * (g - before)
            return (c / jnp.maximum(jnp.linalg.norm(c.ravel()), 1.0)).astype(g.dtype)

        return jax.tree.map(corrected, updates, state.previous), VarianceReductionState(updates)

    return optax.GradientTransformation(init, update)


def mars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.99,
    gamma: float = 0.025,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """MARS-AdamW: AdamW on `c = g + gamma b1 / (1 - b1) (g - g_before)`, clipped to norm 1.

    This is the paper's approximate form: `g_before` is the gradient of the batch before at the
    parameters before, so that a step needs one gradient. As in the authors' code, each parameter's
    c is clipped by its own norm and `g_before` is 0 at the first step; here the method is also
    applied to vectors (their `optimize_1d`). With `gamma = 0` it is AdamW with clipping.

    Args:
        learning_rate: the step size (the paper: 3e-3).
        b1: decay of the average of c (default: the paper's, as all below).
        b2: decay of the average of the squared c.
        gamma: strength of the variance reduction.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, times the learning rate.

    References:
        Yuan et al., MARS: Unleashing the Power of Variance Reduction for Training Large Models,
        https://arxiv.org/abs/2411.10438
    """
    return optax.chain(
        reduce_variance(gamma, b1),
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
