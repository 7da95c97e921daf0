"""Compressed pseudo-gradients: what is sent of an array, and what is made of it on arrival.

Letters: I islands.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lamina.platform.optimizers.islands.method import Whole

Name = Literal["none", "float16", "int8"]

_LARGEST_CODE = 127


class Compression(NamedTuple):
    """A lossy code for float arrays.

    Attributes:
        encode: an array to the arrays that are sent.
        decode: these to the array.
        size: an array (maybe abstract) to the bytes that are sent.
    """

    encode: Callable[[jax.Array], tuple[jax.Array, ...]]
    decode: Callable[..., jax.Array]
    size: Callable[[Any], int]


def encode_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns int8 codes and their float32 scales, one for each index of the last dimension.

    `scale = max |x| / 127` over the other dimensions (over all of a vector), and
    `code = round(x / scale)`, so that decoding is wrong by at most half a scale. Where something
    isn't finite the scale isn't either, so that what has diverged arrives as such.

    Args:
        x: float [...].
    """
    over = tuple(range(max(x.ndim - 1, 1))) if x.ndim else ()
    largest = jnp.max(jnp.abs(x), axis=over, keepdims=True, initial=0.0).astype(jnp.float32)
    scale = jnp.where(largest == 0, 1.0, largest / _LARGEST_CODE)
    return jnp.round(x / scale).astype(jnp.int8), scale


def decode_int8(code: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns what `encode_int8` was given, but for the rounding."""
    return code.astype(scale.dtype) * scale


def _scales(x: Any) -> int:
    return x.shape[-1] if x.ndim > 1 else 1


COMPRESSIONS: Mapping[str, Compression] = {
    "none": Compression(lambda x: (x,), lambda x: x, lambda x: 4 * math.prod(x.shape)),
    "float16": Compression(
        lambda x: (x.astype(jnp.float16),),
        lambda x: x.astype(jnp.float32),
        lambda x: 2 * math.prod(x.shape),
    ),
    "int8": Compression(encode_int8, decode_int8, lambda x: math.prod(x.shape) + 4 * _scales(x)),
}
"""Name to code: as they are (float32), half precision, and eight bits with scales."""


def average(name: Name, whole: Whole) -> Callable[[Any], Any]:
    """Returns a function from a pytree of [I, ...] to the mean over islands of what arrives.

    Args:
        name: of `COMPRESSIONS`.
        whole: sends an array [I, ...] to all islands.
    """
    code = COMPRESSIONS[name]

    def mean(x: jax.Array) -> jax.Array:
        if name == "none":
            return jnp.mean(x, axis=0)
        sent = jax.tree.map(whole, jax.vmap(code.encode)(x))
        return jnp.mean(jax.vmap(code.decode)(*sent).astype(x.dtype), axis=0)

    return lambda tree: jax.tree.map(mean, tree)


def size(name: Name) -> Callable[[Any], int]:
    """Returns a function from a pytree (maybe abstract) to the bytes that are sent of it."""
    return lambda tree: sum(COMPRESSIONS[name].size(leaf) for leaf in jax.tree.leaves(tree))
