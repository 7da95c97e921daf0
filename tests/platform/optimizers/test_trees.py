"""What trees of parameters the optimizers take, and what layouts know of their states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lamina.platform.optimizers.table import OPTIMIZERS, create

ODD = [jnp.ones((2, 3)), (jnp.ones(()), {"stack": jnp.ones((2, 3, 1))}), jnp.ones(1)]
"""Lists, tuples and dictionaries of matrices, a scalar, a stack and a vector."""
PLAIN = {"w": jnp.full((2, 3), 0.2), "b": jnp.array([0.1, 0.4, -0.3])}
QUICK = ("adamw", "lbfgs", "muon", "sm3", "soap")
ALL = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS]
TARGET = jnp.array([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]])


def run_from(params, optimizer, steps, target=TARGET):
    """Returns the parameters after some steps on matrices."""

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p, t: (p - t).astype(p.dtype), params, {"w": target})
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("name", ALL)
def test_any_tree_of_arrays_keeps_its_shapes_and_types_and_so_does_the_state(name):
    optimizer = create(name, 0.1)
    loss = lambda tree: sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))

    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        told = {"value": value, "grad": grads, "value_fn": loss, "metrics": {}}
        updates, state = optimizer.update(grads, state, params, **told)
        return optax.apply_updates(params, updates), state

    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    before = jax.eval_shape(lambda params: (params, optimizer.init(params)), ODD)
    assert types(jax.eval_shape(step, *before)) == types(before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_of_a_state_belongs_to_a_parameter_is_known_so_that_it_can_be_split(name):
    optimizer = create(name, 0.1)
    state = jax.eval_shape(optimizer.init, PLAIN)
    is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
    same = optax.tree_utils.tree_map_params(
        optimizer, lambda leaf, param: leaf, state, PLAIN, is_leaf=is_masked
    )
    assert jax.tree.structure(same) == jax.tree.structure(state)


@pytest.mark.parametrize("search", ["backtracking", "none"])
def test_what_of_lbfgs_belongs_to_a_parameter_is_known_with_any_line_search(search):
    optimizer = create("lbfgs", 1.0, line_search=search)
    state = jax.eval_shape(optimizer.init, PLAIN)
    optax.tree_utils.tree_map_params(optimizer, lambda leaf: leaf, state)


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_matrices_of_bfloat16_are_calculated_with_in_float32(name):
    short = run_from({"w": PLAIN["w"].astype(jnp.bfloat16)}, create(name, 0.01), 3)
    exact = run_from({"w": PLAIN["w"]}, create(name, 0.01), 3)
    np.testing.assert_allclose(np.asarray(short["w"], np.float32), exact["w"], atol=0.01)


@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free_sgd", "soap"])
def test_no_parameters_at_all_are_none_to_move(name):
    optimizer = create(name, 0.1)
    assert optimizer.update({}, optimizer.init({}), {})[0] == {}


@pytest.mark.parametrize("name", ["adamw", "core", "muon", "soap"])
def test_a_parameter_without_elements_is_none_to_move(name):
    params = {"w": jnp.ones((2, 3)), "empty": jnp.zeros((0, 3))}
    optimizer = create(name, 0.1)
    moved, _ = optimizer.update(params, optimizer.init(params), params)
    assert moved["empty"].shape == (0, 3)


def test_soap_takes_a_bounded_step_where_the_same_gradient_comes_again():
    rng = np.random.default_rng(0)
    grads = {"w": jnp.asarray(rng.normal(size=(16, 16)) * np.geomspace(1, 1e3, 16), jnp.float32)}
    optimizer = create("soap", 1.0, weight_decay=0.0)
    state = optimizer.init(grads)
    for _ in range(2):  # the first only gives the bases
        moved, state = optimizer.update(grads, state, grads)
    assert jnp.linalg.norm(moved["w"]) < 16.01  # in its bases every entry is 1 at most


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_matrices_that_are_stacked_for_a_scan_move_as_each_would_by_itself(name):
    target = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3)), jnp.float32)
    axes = ("layers", "embed", "mlp")
    stack = {"w": jnp.zeros((2, 3, 3))}
    whole = run_from(stack, create(name, 0.1, axes={"w": axes}), 3, target)["w"]
    for i in range(2):
        one = run_from({"w": stack["w"][i]}, create(name, 0.1, axes={"w": axes[1:]}), 3, target[i])
        np.testing.assert_allclose(whole[i], one["w"], atol=1e-6)
