"""The attention kernel computes what plain attention does, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from lamina.models import placement
from lamina.models.attention import attend


def inputs(batch=2, length=128, heads=4, groups=2, units=32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((batch, length, n, units) for n in (heads, groups, groups))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("segmented", [False, True])
def test_the_kernel_and_its_gradients_equal_plain_attention(segmented):
    segments = jnp.asarray(np.arange(128)[None] // 50 * np.ones((2, 1)), jnp.int32)
    segments = segments if segmented else None

    def loss(implementation):
        def value(q, k, v):
            out = attend(q, k, v, causal=True, segments_BT=segments, implementation=implementation)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(*inputs())

    (_, expected), expected_grads = loss("dense")
    (_, output), grads = loss("splash")
    np.testing.assert_allclose(output, expected, atol=2e-5)
    for grad, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, other, atol=1e-4)


@pytest.mark.parametrize("heads", [("tensor",), None])
def test_split_over_examples_and_heads_it_is_the_same(heads):
    devices = np.array(jax.devices()).reshape(4, 2)
    mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    named = {"batch": ("data",)}
    if heads:
        named |= {"heads": heads, "kv_heads": heads}
    placed = placement.Placement("cpu", mesh, named)
    arrays = inputs(batch=4)

    def split(*arrays):
        with placement.use(placed):
            return attend(*arrays, causal=True, implementation="splash")

    expected = attend(*arrays, causal=True, implementation="dense")
    np.testing.assert_allclose(jax.jit(split)(*arrays), expected, atol=2e-5)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="causal"):
        attend(*inputs(), causal=False, implementation="splash")
    with pytest.raises(ValueError, match="multiple of 128"):
        attend(*inputs(length=100), causal=True, implementation="splash")


@pytest.mark.parametrize(
    ("platform", "length", "causal", "kernel"),
    [("tpu", 1024, True, True), ("tpu", 1024, False, False), ("tpu", 128, True, False)],
)
def test_auto_takes_the_kernel_on_tpu_for_long_causal_attention(platform, length, causal, kernel):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))

    def run(*arrays):
        with placement.use(placement.Placement(platform, mesh, {})):
            return attend(*arrays, causal=causal)

    traced = str(jax.make_jaxpr(run)(*inputs(length=length)))
    assert ("pallas_call" in traced) is kernel
