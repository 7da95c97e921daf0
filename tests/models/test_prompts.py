"""A pool of prompts: what an example takes, and what trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lamina.models.functional import functional
from lamina.models.prompts import PromptPool
from lamina.models.spec import DataSpec
from lamina.models.vit import vit

SPEC = DataSpec((8, 8, 1), "float32", 4)
SIZES = {"patch": 4, "depth": 1, "embed": 8, "heads": 2}


def test_an_example_takes_the_prompts_of_the_keys_most_like_its_query():
    pool = PromptPool(nnx.Rngs(0), 6, 2, 3, 8, jnp.float32)
    query = jax.random.normal(jax.random.key(1), (4, 8))
    tokens, similarity = pool(query)
    prompts, keys = np.asarray(pool.prompts[...]), np.asarray(pool.keys[...])
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    cosines = unit(np.asarray(query)) @ unit(keys).T
    chosen = np.argsort(-cosines, axis=-1)[:, :3]
    np.testing.assert_array_equal(tokens, prompts[chosen].reshape(4, 6, 8))
    expected = np.take_along_axis(cosines, chosen, -1).sum(-1)
    np.testing.assert_allclose(similarity, expected, rtol=1e-5)


def test_only_chosen_prompts_get_a_gradient():
    model = functional(
        lambda rngs: vit(rngs, SPEC, jnp.float32, prompts=8, prompts_chosen=2, **SIZES)
    )
    params, state = jax.jit(model.init)(jax.random.key(0))
    params["head"]["kernel"] = jax.random.normal(jax.random.key(3), (8, 4))
    images = jax.random.uniform(jax.random.key(1), (1, 8, 8, 1))

    def loss(params):
        output, _ = model.apply(params, state, images, train=True, key=jax.random.key(2))
        return jax.nn.log_softmax(output.logits)[0, 0] - output.similarity.sum()

    gradient = jax.jit(jax.grad(loss))(params)["prompts"]
    for name in ("prompts", "keys"):
        touched = np.abs(gradient[name]).reshape(8, -1).max(-1) > 0
        assert touched.sum() == 2, name


def test_a_model_without_a_pool_tells_no_similarity_and_wrong_sizes_are_refused():
    model = vit(nnx.Rngs(0), SPEC, jnp.float32, **SIZES)
    assert model(jnp.ones((1, 8, 8, 1))).similarity is None
    with pytest.raises(ValueError, match="prompts_chosen=5 between 1 and prompts=2"):
        vit(nnx.Rngs(0), SPEC, jnp.float32, prompts=2, **SIZES)
    with pytest.raises(ValueError, match="set dropout=0"):
        vit(nnx.Rngs(0), SPEC, jnp.float32, prompts=9, dropout=0.1, **SIZES)
