"""Layers shared by the model families: annotated dense maps and how they start.

Parameters are float32; ``dtype`` is what a layer computes in.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models import axes, placement

#: Bytes that one pass of a chunked CPU kernel may work on, so that it stays in a core's cache.
#: Measured on cores with 1 MB of second-level cache: half as much is as fast, twice as much takes
#: twice the time.
CHUNK_BYTES = 1 << 20


class Dense(nnx.Module):
    """A linear map of the last dimensions: ``y = x . kernel + bias``.

    Args:
        rngs: random streams.
        inputs: the dimensions that are contracted, as ``(embed,)`` or ``(heads, head_dim)``.
        outputs: the dimensions that come instead.
        names: logical axes of the kernel, inputs first.
        dtype: compute dtype.
        bias: whether to add a bias. Default: True.
        scale: variance scale of the initialisation. Default: 1.
        init: "fan_in" (LeCun et al. 1998: variance ``scale / fan_in``), "xavier" (Glorot & Bengio
            2010), "he" (He et al. 2015: variance ``2 scale / fan_in``), "zeros", or "uniform":
            between ``+-fan_in^-1/2``, and the bias too, as PyTorch has it.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: Sequence[int],
        outputs: Sequence[int],
        names: Sequence[str],
        dtype: jnp.dtype,
        *,
        bias: bool = True,
        scale: float = 1.0,
        init: str = "fan_in",
    ):
        self.contracted = len(inputs)
        self.dtype = dtype
        initializer = kernel_init(init, len(inputs), len(outputs), scale)
        make = axes.annotate(initializer, *names)
        self.kernel = nnx.Param(make(rngs.params(), (*inputs, *outputs), jnp.float32))
        start = nnx.initializers.zeros_init()
        if init == "uniform":
            start = _uniform(math.prod(inputs))
        start = axes.annotate(start, *names[len(inputs) :])
        self.bias = nnx.Param(start(rngs.params(), tuple(outputs), jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., *inputs]`` to ``[..., *outputs]``."""
        kernel = self.kernel[...].astype(self.dtype)
        batch = x.shape[: x.ndim - self.contracted]
        outputs = kernel.shape[self.contracted :]
        rows = math.prod(kernel.shape[: self.contracted])
        y = x.astype(self.dtype).reshape(*batch, rows) @ kernel.reshape(rows, -1)
        y = y.reshape(*batch, *outputs)
        return y if self.bias is None else add_bias(y, self.bias[...])


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias to the last dimensions of ``x``, in the dtype of ``x``."""
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - bias.ndim) + bias.shape)


def kernel_init(kind: str, inputs: int, outputs: int, scale: float = 1.0) -> axes.Initializer:
    """Returns the initializer ``kind`` for a kernel of ``inputs`` + ``outputs`` dimensions."""
    if kind == "zeros":
        return nnx.initializers.zeros_init()
    kinds: dict[str, tuple[float, Any, Any]] = {
        "fan_in": (1.0, "fan_in", "truncated_normal"),
        "xavier": (1.0, "fan_avg", "uniform"),
        "he": (2.0, "fan_in", "truncated_normal"),
        "uniform": (1 / 3, "fan_in", "uniform"),  # variance 1 / (3 fan_in): +-fan_in^-1/2
    }
    factor, mode, distribution = kinds[kind]
    return nnx.initializers.variance_scaling(
        factor * scale,
        mode,
        distribution,
        in_axis=tuple(range(inputs)),
        out_axis=tuple(range(inputs, inputs + outputs)),
    )


def _uniform(fan_in: int) -> axes.Initializer:
    """Returns an initializer that draws between +-fan_in^-1/2."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def normal(std: float, *names: str | None) -> axes.Initializer:
    """Returns an annotated normal initializer of standard deviation ``std``."""
    return axes.annotate(nnx.initializers.normal(std), *names)


def head(
    rngs: nnx.Rngs, features: int, outputs: int, dtype: jnp.dtype, *, init: str = "fan_in"
) -> Dense:
    """The last layer of a classifier or regressor: its logits are cast to float32 by the model."""
    return Dense(rngs, (features,), (outputs,), (axes.EMBED, axes.CLASSES), dtype, init=init)


def chunk_size(batch: int, bytes_per_example: int) -> int:
    """Returns how many examples a chunked CPU kernel takes at a time: a divisor of ``batch``.

    It is ``batch`` (no chunks) on several devices, where cutting the batch would move data between
    them, and where no divisor but a very small one fits ``CHUNK_BYTES``.
    """
    if not placement.single_device():
        return batch
    wanted = max(1, CHUNK_BYTES // max(1, bytes_per_example))
    if wanted >= batch:
        return batch
    best = max(size for size in range(1, wanted + 1) if batch % size == 0)
    return best if 4 * best >= wanted else batch
