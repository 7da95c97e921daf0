"""Float64 for comparisons with formulas, and one way to run an optimizer on given gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


@pytest.fixture
def x64():
    """Computes in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def follow():
    """Returns `follow(optimizer, start, grads) -> (params after each step, last state)`.

    The gradients, with a leading axis of steps, don't depend on the parameters.
    """

    def run(optimizer, start, grads):
        optimizer = optax.with_extra_args_support(optimizer)
        params = jax.tree.map(jnp.asarray, start)

        def body(carry, grad):
            params, state = carry
            updates, state = optimizer.update(
                grad, state, params, value=jnp.sum(jax.tree.leaves(params)[-1])
            )
            params = optax.apply_updates(params, updates)
            return (params, state), params

        @jax.jit
        def scan(params, grads):
            return jax.lax.scan(body, (params, optimizer.init(params)), grads)

        (_, state), path = scan(params, jax.tree.map(jnp.asarray, grads))
        return jax.tree.map(np.asarray, path), state

    return run


@pytest.fixture(scope="session")
def problem():
    """Returns `(start, grads)`: a matrix of full rank and a vector, and 24 gradients of each."""
    rng = np.random.default_rng(0)
    shapes = {"matrix": (4, 4), "vector": (5,)}
    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return start, {name: rng.normal(size=(24, *shape)) for name, shape in shapes.items()}
