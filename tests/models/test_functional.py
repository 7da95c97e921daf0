"""The functional view of modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lamina.models import axes
from lamina.models.functional import functional, parameter_count
from lamina.models.spec import Output


class Plain(nnx.Module):
    """A user's module: no annotations, its own stored streams, a list, batch norm."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(11)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.dropout(self.norm(x))


X = jnp.arange(12.0).reshape(3, 4)


@pytest.fixture(scope="module")
def plain():
    model = functional(Plain)
    return model, *jax.jit(model.init)(jax.random.key(0))


def keys_of(tree):
    if not isinstance(tree, dict):
        return []
    return [k for k in tree] + [k for v in tree.values() for k in keys_of(v)]


def test_trees_are_nested_dicts_with_string_keys_and_match_the_abstract_ones(plain):
    model, params, state = plain
    assert all(isinstance(key, str) for key in keys_of(params) + keys_of(state))
    assert set(params["layers"]) == {str(i) for i in range(11)}
    for real, abstract in ((params, model.params), (state, model.model_state)):
        assert jax.tree.structure(real) == jax.tree.structure(abstract)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), real) == jax.tree.map(
            lambda a: (a.shape, a.dtype), abstract
        )
    assert parameter_count(params) == 11 * 20 + 8


def test_random_state_is_neither_parameter_nor_model_state(plain):
    model, _, _ = plain
    assert "dropout" not in model.params
    assert set(keys_of(model.model_state)) == {"norm", "mean", "var"}


def test_axes_of_a_module_without_annotations_are_none(plain):
    model, _, _ = plain
    assert model.axes["layers"]["3"]["kernel"] == (None, None)


def test_integer_keys_return_to_their_places(plain):
    model, params, state = plain
    bound = model.bind(params, state)
    for i in range(11):
        np.testing.assert_array_equal(
            bound.layers[i].kernel[...], params["layers"][str(i)]["kernel"]
        )


def test_eval_uses_running_statistics_and_leaves_them(plain):
    model, params, state = plain
    output, after = model.apply(params, state, X, train=False)
    assert isinstance(output, Output)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    np.testing.assert_array_equal(output.logits, model.bind(params, state)(X))


def test_train_updates_running_statistics(plain):
    model, params, state = plain
    _, after = model.apply(params, state, X, train=True, key=jax.random.key(1))
    assert not np.allclose(after["norm"]["mean"], state["norm"]["mean"])


def test_stored_streams_follow_the_key(plain):
    model, params, state = plain

    @jax.jit
    def run(key):
        return model.apply(params, state, X, train=True, key=key)[0].logits

    a, b, c = (run(jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_training_without_a_key_is_refused(plain):
    model, params, state = plain
    with pytest.raises(ValueError, match="pass key="):
        model.apply(params, state, X, train=True)


def test_init_under_vmap_equals_single_inits(plain):
    model, _, _ = plain
    keys = jax.random.split(jax.random.key(3), 2)
    many = jax.jit(jax.vmap(model.init))(keys)
    for i in range(2):
        one = jax.jit(model.init)(keys[i])
        jax.tree.map(lambda m, o, i=i: np.testing.assert_array_equal(m[i], o), many, one)


def test_apply_under_vmap_and_grad(plain):
    model, _, _ = plain
    params, state = jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(3), 2))

    def loss(p, s, k):
        output, s = model.apply(p, s, X, train=True, key=k)
        return (output.logits**2).sum(), s

    grad = jax.vmap(jax.grad(loss, has_aux=True))
    grads, new_state = jax.jit(grad)(params, state, jax.random.split(jax.random.key(1), 2))
    assert grads["layers"]["0"]["kernel"].shape == (2, 4, 4)
    assert new_state["norm"]["mean"].shape == (2, 4)


def test_flax_partitioning_names_are_taken_over_without_a_mesh():
    def make(rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        return nnx.Linear(2, 3, kernel_init=init, rngs=rngs)

    model = functional(make)
    assert model.axes == {"kernel": ("embed", "mlp"), "bias": (None,)}
    params, state = model.init(jax.random.key(0))
    assert model.apply(params, state, jnp.ones((1, 2)), train=True)[0].logits.shape == (1, 3)


def test_unknown_axis_names_are_refused():
    with pytest.raises(ValueError, match="vocabulary"):
        axes.annotate(nnx.initializers.zeros_init(), "width")


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("embed", "mlp"), (0, 1)),
        (("layers", "embed", "heads", "head_dim"), (1, 2)),
        (("layers", "heads", "head_dim", "embed"), (1, 3)),
        (("kernel_h", "kernel_w", "conv_in", "conv_out"), (0, 3)),
        ((None, None, None), (0, 2)),
    ],
)
def test_matrix_view_follows_the_names(names, split):
    assert axes.matrix_split(names) == split


def test_a_stacked_vector_is_no_matrix():
    with pytest.raises(ValueError, match="no matrix"):
        axes.matrix_split(("layers", "norm"))
