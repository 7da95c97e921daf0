"""The k largest entries of arrays on devices, without sorting them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.merging.method import count_kept


def trim(arrays: Sequence[jax.Array], density: float) -> list[jax.Array]:
    """Sets all but the largest magnitudes of several arrays together to zero.

    Exactly `floor(density n)` of the n entries stay, of equal ones at the limit those that come
    first; those of them that are zero don't show.

    Args:
        arrays: floating-point, of one dtype or several, in the order in which they count.
        density: fraction to keep.
    """
    keep = count_kept(sum(array.size for array in arrays), density)
    if keep == 0:
        return [jnp.zeros_like(array) for array in arrays]
    wide = any(array.dtype == np.float64 for array in arrays)
    magnitudes = [_ordered(array, wide) for array in arrays]
    limit = kth_largest(magnitudes, jnp.uint32(keep))
    room = jnp.uint32(keep) - _count([m > limit for m in magnitudes])
    equal = [m == limit for m in magnitudes]
    # Counted from the end, so that the first places are the largest numbers; 0 is no candidate.
    places, after = [], sum(array.size for array in arrays)
    for array, each in zip(arrays, equal, strict=True):
        ahead = jnp.uint32(after) - jnp.arange(array.size, dtype=jnp.uint32).reshape(array.shape)
        places.append(jnp.where(each, ahead, jnp.uint32(0)))
        after -= array.size
    last = jax.lax.cond(
        _count(equal) == room, lambda: jnp.uint32(1), lambda: kth_largest(places, room)
    )
    return [
        jnp.where((m > limit) | (place >= last), array, jnp.zeros_like(array))
        for array, m, place in zip(arrays, magnitudes, places, strict=True)
    ]


def _count(masks: Sequence[jax.Array]) -> jax.Array:
    return sum((mask.sum(dtype=jnp.uint32) for mask in masks), jnp.uint32(0))


def kth_largest(values: Sequence[jax.Array], k: jax.Array) -> jax.Array:
    """Returns the k-th largest of unsigned integers without the top bit, k >= 1.

    It finds the answer's bits from the highest down, by counting: one pass over the data for each
    bit, each a plain reduction, which devices that share the data do together.
    """
    bits = 8 * values[0].dtype.itemsize - 1
    one = values[0].dtype.type(1)

    def find(step: jax.Array, limit: jax.Array) -> jax.Array:
        candidate = limit | (one << (bits - 1 - step).astype(limit.dtype))
        return jnp.where(_count([v >= candidate for v in values]) >= k, candidate, limit)

    return jax.lax.fori_loop(0, bits, find, jnp.zeros((), values[0].dtype))


def _ordered(array: jax.Array, wide: bool) -> jax.Array:
    """Returns integers in the order of the magnitudes: the bits of a float without its sign."""
    if wide:
        return jax.lax.bitcast_convert_type(jnp.abs(array.astype(jnp.float64)), jnp.uint64)
    return jax.lax.bitcast_convert_type(jnp.abs(array), jnp.uint32)
