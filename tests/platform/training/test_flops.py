"""FLOPs are counted from the jaxpr, loops and all."""

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.training import flops


def test_a_matrix_product_takes_two_per_multiplication():
    assert flops.count(jnp.dot, jnp.ones((3, 5)), jnp.ones((5, 7))) == 2 * 3 * 5 * 7


def test_batched_products_count_every_batch():
    a, b = jnp.ones((4, 3, 5)), jnp.ones((4, 5, 7))
    assert flops.count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b) == 4 * 2 * 3 * 5 * 7


def test_the_body_of_a_scan_counts_as_often_as_it_runs():
    w = jnp.ones((6, 8, 8))
    scanned = lambda x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    assert flops.count(scanned, jnp.ones((2, 8))) == 6 * 2 * 2 * 8 * 8


def test_jit_remat_and_gradients_are_looked_into():
    w, x = jnp.ones((8, 8)), jnp.ones((2, 8))
    loss = jax.jit(lambda w, x: (jax.checkpoint(lambda w, x: x @ w)(w, x) ** 2).sum())
    forward = flops.count(loss, w, x)
    assert forward == 2 * 2 * 8 * 8
    assert flops.count(jax.grad(loss, argnums=(0, 1)), w, x) >= 3 * forward


def test_a_convolution_agrees_with_the_compiler():
    conv = jax.jit(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    x, k = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4, 6))
    compiled = conv.lower(x, k).compile().cost_analysis()["flops"]
    np.testing.assert_allclose(flops.count(conv, x, k), compiled, rtol=1e-6)
