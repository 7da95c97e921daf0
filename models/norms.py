"""Normalisation layers: statistics, scale and bias in float32, whatever the compute dtype.

Letters: B batch, H height, W width, C channels, D width.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models import axes


class Identity(nnx.Module):
    """Returns its input."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``x``."""
        return x


class LayerNorm(nnx.Module):
    """Layer norm (Ba et al. 2016) over the last dimension; epsilon 1e-6 as in ViT."""

    def __init__(self, rngs: nnx.Rngs, features: int, dtype: jnp.dtype, epsilon: float = 1e-6):
        self.scale, self.bias = _scale(rngs, features), _bias(rngs, features)
        self.dtype, self.epsilon = dtype, epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., D]`` to the same."""
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + self.epsilon)
        y = x * _last(self.scale[...], x) + _last(self.bias[...], x)
        return y.astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root mean square norm (Zhang & Sennrich 2019); epsilon 1e-6 as in LLaMA."""

    def __init__(self, rngs: nnx.Rngs, features: int, dtype: jnp.dtype, epsilon: float = 1e-6):
        self.scale = _scale(rngs, features)
        self.dtype, self.epsilon = dtype, epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., D]`` to the same."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + self.epsilon)
        return (x * _last(self.scale[...], x)).astype(self.dtype)


class GroupNorm(nnx.Module):
    """Group norm (Wu & He 2018) of ``[B, H, W, C]``: at most 32 groups, of at least 4 channels."""

    def __init__(self, rngs: nnx.Rngs, features: int, dtype: jnp.dtype, zero_scale: bool = False):
        self.scale, self.bias = _scale(rngs, features, zero_scale), _bias(rngs, features)
        self.groups = math.gcd(features, min(32, max(1, features // 4)))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[B, H, W, C]`` to the same; epsilon 1e-5."""
        shape = x.shape
        x = x.astype(jnp.float32).reshape(*shape[:3], self.groups, -1)
        x = x - x.mean((1, 2, 4), keepdims=True)
        x = x * jax.lax.rsqrt((x**2).mean((1, 2, 4), keepdims=True) + 1e-5)
        x = x.reshape(shape)
        return (x * _last(self.scale[...], x) + _last(self.bias[...], x)).astype(self.dtype)


class BatchNorm(nnx.Module):
    """Batch norm (Ioffe & Szegedy 2015) over all dimensions but the last.

    In training (``.train()``) it uses the batch's statistics and moves the running ones by a tenth
    (momentum 0.9, epsilon 1e-5: as torchvision); in evaluation it uses the running ones.
    """

    def __init__(self, rngs: nnx.Rngs, features: int, dtype: jnp.dtype, zero_scale: bool = False):
        self.scale, self.bias = _scale(rngs, features, zero_scale), _bias(rngs, features)
        self.mean = nnx.BatchStat(jnp.zeros((features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((features,), jnp.float32))
        self.use_running_average = False
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[B, ..., C]`` to the same."""
        x = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            over = tuple(range(x.ndim - 1))
            # One pass over the data, at the price of cancellation where |mean| >> deviation.
            batch_mean, squares = x.mean(over), (x**2).mean(over)
            batch_var = jnp.maximum(squares - batch_mean**2, 0.0)
            self.mean[...] = 0.9 * mean + 0.1 * batch_mean
            self.var[...] = 0.9 * var + 0.1 * batch_var
            mean, var = batch_mean, batch_var
        factor = self.scale[...] * jax.lax.rsqrt(var + 1e-5)
        offset = self.bias[...] - mean * factor
        return (x * _last(factor, x) + _last(offset, x)).astype(self.dtype)


def image_norm(
    kind: str, rngs: nnx.Rngs, channels: int, dtype: jnp.dtype, *, zero_scale: bool = False
) -> nnx.Module:
    """Returns the norm of feature maps ``[B, H, W, C]``.

    Args:
        kind: "batch", "group" or "none".
        rngs: random streams.
        channels: C.
        dtype: compute dtype.
        zero_scale: starts the scale at zero, for the last norm of a residual branch
            (Goyal et al. 2017). Default: False.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "batch":
        return BatchNorm(rngs, channels, dtype, zero_scale)
    if kind == "group":
        return GroupNorm(rngs, channels, dtype, zero_scale)
    if kind == "none":
        return Identity()
    raise ValueError(f"unknown norm {kind!r}; it may be 'batch', 'group' or 'none'")


def _scale(rngs: nnx.Rngs, features: int, zero: bool = False) -> nnx.Param:
    start = nnx.initializers.zeros_init() if zero else nnx.initializers.ones_init()
    return nnx.Param(axes.annotate(start, axes.NORM)(rngs.params(), (features,), jnp.float32))


def _bias(rngs: nnx.Rngs, features: int) -> nnx.Param:
    return _scale(rngs, features, zero=True)


def _last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Gives a vector the rank of ``x``, along its last dimension."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))
