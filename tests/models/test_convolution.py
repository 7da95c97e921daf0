"""Both lowerings of the convolution are one function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lamina.models import layers
from lamina.models.convolution import Conv, convolve, max_pool


def data(batch=4, size=(9, 8), kernel=(3, 3), inputs=3, outputs=5):
    kx, kw = jax.random.split(jax.random.key(0))
    x = jax.random.normal(kx, (batch, *size, inputs))
    return x, jax.random.normal(kw, (*kernel, inputs, outputs))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel", "stride"),
    [
        ((9, 8), (3, 3), 1),
        ((9, 8), (3, 3), 2),
        ((8, 8), (7, 7), 2),
        ((7, 9), (1, 1), 2),
        ((6, 6), (2, 4), 3),
    ],
)
def test_patches_equal_conv_in_value_and_gradient(monkeypatch, chunked, size, kernel, stride):
    if chunked:
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        monkeypatch.setattr(layers, "CHUNK_BYTES", 20000)
    x, w = data(size=size, kernel=kernel)

    def run(lowering):
        def loss(x, w):
            y = convolve(x, w, stride=stride, lowering=lowering)
            return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, y), grads = step(x, w)
        return y, *grads

    for a, b in zip(run("patches"), run("conv"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_patches_equal_conv_under_vmap_over_weights_and_in_forward_mode():
    x, w = data()
    many = jnp.stack([w, 2 * w])

    def run(lowering):
        f = lambda w: convolve(x, w, lowering=lowering)
        return jax.jit(jax.vmap(lambda w: jax.jvp(f, (w,), (w + 1,))))(many)

    for a, b in zip(run("patches"), run("conv"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_auto_is_patches_on_cpu_and_conv_elsewhere(monkeypatch):
    x, w = data()
    text = lambda: str(jax.make_jaxpr(lambda x, w: convolve(x, w))(x, w))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert "conv_general_dilated" not in text()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "conv_general_dilated" in text()


def test_conv_computes_in_its_dtype_with_float32_parameters():
    conv = Conv(nnx.Rngs(0), 3, 5, (3, 3), jnp.bfloat16, bias=True)
    assert conv(data()[0]).dtype == jnp.bfloat16
    assert conv.kernel.dtype == conv.bias.dtype == jnp.float32


def test_unknown_lowering_names_the_known_ones():
    with pytest.raises(ValueError, match="patches"):
        Conv(nnx.Rngs(0), 3, 5, (3, 3), jnp.float32, lowering="fft")


def test_max_pool_equals_reduce_window_and_drops_the_rest():
    x, _ = data(size=(7, 9))
    expected = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(max_pool(x), expected)


def test_chunks_divide_the_batch_and_are_off_on_several_devices(monkeypatch):
    monkeypatch.setattr(layers, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert layers.chunk_size(128, 60) == 16
    assert layers.chunk_size(127, 60) == 127  # a prime: chunks of one would be slow
    assert layers.chunk_size(8, 60) == 8
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert layers.chunk_size(128, 60) == 128
