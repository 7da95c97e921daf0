"""The implementations of attention are one function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.models import layers
from lamina.models.attention import attend, attend_cached

B, T, H, K = 4, 64, 4, 8


def inputs(groups=H):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, T, H, K), (B, T, groups, K), (B, T, groups, K)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


SEGMENTS = jnp.sort(jax.random.randint(jax.random.key(1), (B, T), 0, 3), axis=1)


@functools.cache
def value_and_gradients(implementation, groups, causal, packed):
    def loss(*qkv):
        segments = SEGMENTS if packed else None
        y = attend(*qkv, causal=causal, segments_BT=segments, implementation=implementation)
        return (y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs(groups))
    return y, *grads


@pytest.mark.parametrize("implementation", ["blocked", "fused"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_implementations_are_equal(monkeypatch, implementation, groups, causal, packed):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(layers, "CHUNK_BYTES", 2 * 4 * H * T * T)
    found = value_and_gradients(implementation, groups, causal, packed)
    expected = value_and_gradients("dense", groups, causal, packed)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_grouped_queries_equal_full_heads_with_repeated_keys():
    q, k, v = inputs(2)
    full = attend(q, k.repeat(2, 2), v.repeat(2, 2), causal=True)
    np.testing.assert_allclose(attend(q, k, v, causal=True), full, rtol=1e-4, atol=1e-6)


def test_a_cache_is_read_up_to_the_query_only():
    q, k, v = inputs()
    rotten = [x.at[:, 20:].set(jnp.inf if x is k else 1e30) for x in (k, v)]
    finite = [jnp.where(jnp.isinf(x), 1e30, x) for x in rotten]
    np.testing.assert_allclose(
        attend_cached(q[:, 18:20], *finite, jnp.int32(18)),
        attend(q, k, v, causal=True)[:, 18:20],
        rtol=1e-4,
        atol=1e-6,
    )


def test_bfloat16_stays_near_float32():
    q, k, v = inputs()
    low = attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)), causal=True)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), attend(q, k, v, causal=True), atol=0.05)


def test_errors_name_the_choices():
    q, k, v = inputs(3)
    with pytest.raises(ValueError, match="multiple of 3"):
        attend(q, k, v, causal=True)
    with pytest.raises(ValueError, match="blocked"):
        attend(q, q, q, causal=True, implementation="flash")
