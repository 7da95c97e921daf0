"""Evaluation uses the averaged weights of schedule-free optimizers, and plain ones otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lamina.platform.errors import UserError
from lamina.platform.optimizers.schedules import constant
from lamina.platform.optimizers.table import create
from lamina.platform.optimizers.weights import eval_params

GRADS = np.random.default_rng(0).normal(size=(20, 4))
THETA = np.array([0.5, -1.0, 2.0, 0.1])


def final(name, learning_rate, **keys):
    optimizer = create(name, learning_rate, **keys)
    params = jnp.asarray(THETA, jnp.float32)
    state = optimizer.init(params)

    def body(carry, grad):
        params, state = carry
        updates, state = optimizer.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(body, (params, state), jnp.asarray(GRADS, jnp.float32))
    return params, state


def reference(direction, warmup):
    """Schedule-free averaging in float64, with the learning rate's warm-up in the weights."""
    x = z = THETA
    b1, total = 0.9, 0.0
    for t, grad in enumerate(GRADS):
        rate = 0.1 * min((t + 1) / warmup, 1)
        y = (1 - b1) * z + b1 * x
        z = z - rate * (direction(t, grad) + 0.05 * y)
        total += rate**2
        c = rate**2 / total
        x = (1 - c) * x + c * z
    return (1 - b1) * z + b1 * x, x


@pytest.mark.parametrize("warmup", [1, 8])
def test_schedule_free_sgd_evaluates_the_weighted_average_of_its_iterates(warmup):
    factor = constant(20, warmup_steps=warmup)
    rate = lambda count: 0.1 * factor(count)
    params, state = final("schedule_free_sgd", rate, weight_decay=0.05)
    y, x = reference(lambda t, g: g, warmup)
    np.testing.assert_allclose(params, y, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(eval_params("schedule_free_sgd", state, params), x, rtol=2e-5)


def test_schedule_free_adamw_evaluates_the_weighted_average_of_its_iterates():
    def direction(t, grad):
        v = sum(0.999 ** (t - i) * 0.001 * GRADS[i] ** 2 for i in range(t + 1))
        return grad / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)

    factor = constant(20, warmup_steps=5)
    rate = lambda count: 0.1 * factor(count)
    params, state = final("schedule_free_adamw", rate, weight_decay=0.05)
    _, x = reference(direction, 5)
    np.testing.assert_allclose(eval_params("x", state, params), x, rtol=1e-4, atol=1e-5)


def test_the_average_is_found_behind_clipping_and_under_vmap():
    clipped = lambda rate: optax.chain(
        optax.clip_by_global_norm(1e9), create("schedule_free_sgd", rate)
    )
    params, state = final(clipped, 0.1)
    plain, plain_state = final("schedule_free_sgd", 0.1)
    expected = eval_params("schedule_free_sgd", plain_state, plain)
    np.testing.assert_allclose(eval_params("schedule_free_sgd", state, params), expected, rtol=1e-5)
    assert not np.allclose(expected, params)
    stack = lambda tree: jax.tree.map(lambda v: jnp.stack([v, v]), tree)
    both = jax.vmap(lambda s, p: eval_params("x", s, p))(stack(state), stack(params))
    np.testing.assert_allclose(both[1], expected, rtol=1e-5)


def test_other_optimizers_evaluate_the_trained_parameters():
    params, state = final("adamw", 0.1)
    assert eval_params("adamw", state, params) is params


def test_parts_with_different_parameters_are_put_together():
    parts = {"a": create("schedule_free_sgd", 0.1), "b": create("schedule_free_sgd", 0.2)}
    labels = {"x": "a", "y": "b"}
    optimizer = optax.partition(parts, labels)
    params = {"x": jnp.ones(3), "y": jnp.ones(2)}
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
    average = eval_params("mine", state, params)
    alone = parts["b"].init(jnp.ones(2))
    y = jnp.ones(2)
    for _ in range(3):
        updates, alone = parts["b"].update(y, alone, y)
        y = y + updates
    np.testing.assert_allclose(average["y"], eval_params("b", alone, y), rtol=1e-6)
    assert not np.allclose(average["x"], params["x"])


def test_several_averages_are_refused():
    optimizer = optax.chain(*[create("schedule_free_sgd", 0.1)] * 2)
    params = jnp.ones(3)
    with pytest.raises(UserError, match="'mine' holds 2 schedule-free parts"):
        eval_params("mine", optimizer.init(params), params)
