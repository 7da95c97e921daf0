"""What learners that classify by a model's features share."""

import jax
import jax.numpy as jnp

from lamina.platform.data.feed import normalise
from lamina.platform.errors import UserError
from lamina.platform.training.learners import Setup


def width(setup: Setup, learner: str) -> int:
    """Returns the length D of the features.

    Raises:
        UserError: the model has none, or more than one vector for an example.
    """
    answer = lambda params, batch: setup.forward(params, normalise(batch)).features
    found = jax.eval_shape(answer, setup.params, dict(setup.batch))
    if found is None or len(found.shape) != 2:
        has = "doesn't tell them" if found is None else f"gives {list(found.shape)}"
        raise UserError(
            f"learner {learner!r} needs one vector of features per example, and the model {has}"
        )
    return found.shape[-1]


def unit(features: jax.Array) -> jax.Array:
    """Returns vectors [..., D] divided by their lengths."""
    square = jnp.sum(features**2, axis=-1, keepdims=True)
    return features * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
