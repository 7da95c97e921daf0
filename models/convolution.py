"""Convolution of images with a choice of lowering: patches and a matrix product, or ``lax.conv``.

XLA's convolution on CPU is fast in a straight program, but its weight gradient is 30 times slower
inside a loop, and ``vmap`` over the weights makes it a slow grouped convolution. Patches and one
matrix product are fast everywhere, if they are made for a few examples at a time so that they stay
in the cache, and are made again in the backward pass instead of being kept.

Letters: B batch, H height, W width, C input channels, D output channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models import axes, placement
from lamina.models.layers import add_bias, chunk_size, kernel_init

LOWERINGS = ("auto", "patches", "conv")


def convolve(
    x_BHWC: jax.Array, kernel_hwCD: jax.Array, *, stride: int = 1, lowering: str = "auto"
) -> jax.Array:
    """Convolves with SAME padding: the output has ``ceil(H / stride)`` rows.

    Args:
        x_BHWC: images.
        kernel_hwCD: the kernel, of the dtype of the images.
        stride: step in both directions. Default: 1.
        lowering: "patches", "conv", or "auto": "patches" where the program is for a CPU, else
            "conv". Both can be differentiated in any mode. Default: "auto".

    Returns:
        ``[B, H', W', D]``.

    Raises:
        ValueError: an unknown lowering.
    """
    if lowering not in LOWERINGS:
        raise ValueError(f"unknown lowering {lowering!r}; it may be one of {LOWERINGS}")
    if lowering == "auto":
        lowering = "patches" if placement.platform() == "cpu" else "conv"
    if lowering == "conv":
        return jax.lax.conv_general_dilated(
            x_BHWC,
            kernel_hwCD,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    return _by_patches(x_BHWC, kernel_hwCD, stride)


def _by_patches(x_BHWC: jax.Array, kernel_hwCD: jax.Array, stride: int) -> jax.Array:
    batch, height, width, channels = x_BHWC.shape
    rows, columns = kernel_hwCD.shape[:2]
    pixels = -(-height // stride) * -(-width // stride)
    chunk = chunk_size(batch, pixels * rows * columns * channels * x_BHWC.dtype.itemsize)
    if chunk == batch or rows * columns == 1:
        return _patches_and_product(x_BHWC, kernel_hwCD, stride)

    @jax.checkpoint
    def one(x: jax.Array) -> jax.Array:
        return _patches_and_product(x, kernel_hwCD, stride)

    y = jax.lax.map(one, x_BHWC.reshape(batch // chunk, chunk, *x_BHWC.shape[1:]))
    return y.reshape(batch, *y.shape[2:])


def _patches_and_product(x_BHWC: jax.Array, kernel_hwCD: jax.Array, stride: int) -> jax.Array:
    rows, columns, _, outputs = kernel_hwCD.shape
    top, bottom, height = _same(x_BHWC.shape[1], rows, stride)
    left, right, width = _same(x_BHWC.shape[2], columns, stride)
    padded = jnp.pad(x_BHWC, ((0, 0), (top, bottom), (left, right), (0, 0)))
    views = [
        padded[
            :,
            i : i + (height - 1) * stride + 1 : stride,
            j : j + (width - 1) * stride + 1 : stride,
        ]
        for i in range(rows)
        for j in range(columns)
    ]
    patches = jnp.concatenate(views, axis=-1).reshape(-1, kernel_hwCD[..., 0].size)
    product = patches @ kernel_hwCD.reshape(-1, outputs)
    return product.reshape(x_BHWC.shape[0], height, width, outputs)


def _same(size: int, kernel: int, stride: int) -> tuple[int, int, int]:
    """Returns SAME padding before and after, and the output's size."""
    output = -(-size // stride)
    total = max((output - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2, output


def max_pool(x_BHWC: jax.Array, window: int = 2) -> jax.Array:
    """Takes the maximum of windows that do not overlap; left-over rows and columns are dropped.

    Written with a reshape: the gradient of ``lax.reduce_window`` is slow on CPU.
    """
    batch, height, width, channels = x_BHWC.shape
    rows, columns = height // window, width // window
    x = x_BHWC[:, : rows * window, : columns * window]
    return x.reshape(batch, rows, window, columns, window, channels).max((2, 4))


class Conv(nnx.Module):
    """A convolution layer with SAME padding.

    Args:
        rngs: random streams.
        inputs: input channels.
        outputs: output channels.
        kernel: rows and columns of the kernel.
        dtype: compute dtype; the parameters are float32.
        stride: Default: 1.
        bias: Default: False, for a norm follows.
        lowering: see ``convolve``. Default: "auto".

    The kernel starts with variance ``2 / fan_in`` (He et al. 2015).
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        dtype: jnp.dtype,
        *,
        stride: int = 1,
        bias: bool = False,
        lowering: str = "auto",
    ):
        if lowering not in LOWERINGS:
            raise ValueError(f"unknown lowering {lowering!r}; it may be one of {LOWERINGS}")
        self.dtype = dtype
        self.stride = stride
        self.lowering = lowering
        names = (axes.KERNEL_H, axes.KERNEL_W, axes.CONV_IN, axes.CONV_OUT)
        make = axes.annotate(kernel_init("he", 3, 1), *names)
        self.kernel = nnx.Param(make(rngs.params(), (*kernel, inputs, outputs), jnp.float32))
        zeros = axes.annotate(nnx.initializers.zeros_init(), axes.CONV_OUT)
        self.bias = nnx.Param(zeros(rngs.params(), (outputs,), jnp.float32)) if bias else None

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Maps ``[B, H, W, inputs]`` to ``[B, H', W', outputs]``."""
        y = convolve(
            x_BHWC.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            stride=self.stride,
            lowering=self.lowering,
        )
        return y if self.bias is None else add_bias(y, self.bias[...])
