"""Low-rank adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.models import lora
from lamina.models.functional import functional
from lamina.models.spec import DataSpec
from lamina.models.transformer import transformer

SPEC = DataSpec((8,), "int32", 16)
PATHS = ("query/kernel", "output/kernel")


@pytest.fixture(scope="module")
def model():
    make = lambda rngs: transformer(rngs, SPEC, jnp.float32, depth=2, embed=8, heads=2)
    model = functional(make)
    return model, jax.jit(model.init)(jax.random.key(0))[0]


def adapters_of(model, params, **options):
    options = {"rank": 2, "paths": PATHS, "axes": model.axes, **options}
    return lora.init(jax.random.key(1), params, **options)


def test_adapters_start_as_the_base_exactly(model):
    model, params = model
    adapted = lora.apply(params, adapters_of(model, params), rank=2, alpha=4.0)
    jax.tree.map(np.testing.assert_array_equal, adapted, params)


def test_matrix_views_follow_the_axes_layer_by_layer(model):
    model, params = model
    block = adapters_of(model, params)["layers"]["blocks"]
    assert jax.tree.map(jnp.shape, block) == {
        "query": {"kernel": {"a": (2, 8, 2), "b": (2, 2, 8)}},
        "output": {"kernel": {"a": (2, 8, 2), "b": (2, 2, 8)}},
    }


def test_merge_adds_the_scaled_product_of_each_layer(model):
    model, params = model
    adapters = jax.tree.map(lambda x: x + 1.0, adapters_of(model, params))
    merged = lora.merge(params, adapters, rank=2, alpha=6.0)
    pair = adapters["layers"]["blocks"]["query"]["kernel"]
    for layer in range(2):
        np.testing.assert_allclose(
            merged["layers"]["blocks"]["query"]["kernel"][layer],
            params["layers"]["blocks"]["query"]["kernel"][layer]
            + 3.0 * (np.asarray(pair["a"][layer]) @ np.asarray(pair["b"][layer])).reshape(8, 2, 4),
            rtol=1e-5,
        )
    np.testing.assert_array_equal(merged["embedding"], params["embedding"])


def test_only_b_has_a_gradient_at_the_start(model):
    model, params = model
    adapters = adapters_of(model, params)

    @jax.jit
    @jax.grad
    def grad(adapters):
        adapted = lora.apply(params, adapters, rank=2, alpha=4.0)
        tokens = jnp.arange(8, dtype=jnp.int32)[None]
        return model.apply(adapted, {}, tokens, train=False)[0].logits.std()

    pair = grad(adapters)["layers"]["blocks"]["query"]["kernel"]
    assert np.any(pair["b"] != 0)
    np.testing.assert_array_equal(pair["a"], 0)


def test_without_axes_the_last_dimension_is_the_columns():
    adapters = lora.init(
        jax.random.key(0), {"kernel": jnp.ones((3, 3, 4, 5))}, rank=2, paths=(".",)
    )
    assert adapters["kernel"]["a"].shape == (36, 2)
    assert adapters["kernel"]["b"].shape == (2, 5)


def test_an_expression_without_a_match_names_what_can_be_adapted(model):
    model, params = model
    with pytest.raises(ValueError, match="layers/blocks/value/kernel"):
        adapters_of(model, params, paths=("qkv",))


def test_another_rank_is_refused(model):
    model, params = model
    with pytest.raises(ValueError, match="rank 2, not rank=3"):
        lora.apply(params, adapters_of(model, params), rank=3, alpha=1.0)


def test_adapters_have_logical_axes_of_their_rank(model):
    model, params = model
    adapters = adapters_of(model, params)
    axes = lora.adapter_axes(adapters, model.axes)
    assert axes["layers"]["blocks"]["query"]["kernel"] == {
        "a": ("layers", "embed", None),
        "b": ("layers", None, None),
    }
    for leaf, names in zip(
        jax.tree.leaves(adapters),
        jax.tree.leaves(axes, is_leaf=lambda n: isinstance(n, tuple)),
        strict=True,
    ):
        assert len(names) == leaf.ndim
