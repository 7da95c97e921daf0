"""The k largest entries of arrays on devices, without sorting them.

A model may have more than 2**32 entries, and without x64 there are no wider integers: counts over
several arrays are pairs (`Wide`). One array has fewer than 2**31.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.merging.method import count_kept

Wide = tuple[jax.Array, jax.Array]
"""A count: `high * 2**16 + low`, with low < 2**16, both uint32."""


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
    double = any(array.dtype == np.float64 for array in arrays)
    magnitudes = [_ordered(array, double) for array in arrays]
    limit = kth_largest(magnitudes, wide(keep))
    room = minus(wide(keep), total([_count(m > limit) for m in magnitudes]))
    equal, stays = [m == limit for m in magnitudes], []
    for mask in equal:
        stays.append(_at_most(room, _count(mask)))
        room = minus(room, wide(stays[-1]))
    return [
        jnp.where((m > limit) | first, array, jnp.zeros_like(array))
        for array, m, first in zip(arrays, magnitudes, _first(equal, stays), strict=True)
    ]


def _first(masks: Sequence[jax.Array], stays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the first places that are set in each mask, as many as stay of it."""
    # Counted from the end, so that the first places are the largest numbers; 0 is no candidate.
    places = [
        jnp.where(mask, jnp.uint32(mask.size) - _numbers(mask.shape), jnp.uint32(0))
        for mask in masks
    ]
    wanted, there = jnp.stack(stays), jnp.stack([_count(mask) for mask in masks])

    def find(step: jax.Array, limits: jax.Array) -> jax.Array:
        candidates = limits | (jnp.uint32(1) << (30 - step).astype(jnp.uint32))
        counts = jnp.stack([_count(p >= candidates[n]) for n, p in enumerate(places)])
        return jnp.where(counts >= wanted, candidates, limits)

    last = jax.lax.cond(
        ((wanted > 0) & (wanted < there)).any(),
        lambda: jax.lax.fori_loop(0, 31, find, jnp.zeros_like(wanted)),
        lambda: jnp.where(wanted == 0, jnp.uint32(2**31 - 1), jnp.uint32(1)),
    )
    return [p >= last[n] for n, p in enumerate(places)]


def _numbers(shape: tuple[int, ...]) -> jax.Array:
    """Returns the place of each entry in the flattened array."""
    return jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)


def kth_largest(values: Sequence[jax.Array], k: Wide) -> jax.Array:
    """Returns the k-th largest of unsigned integers without the top bit, k >= 1.

    It finds the answer's bits from the highest down, by counting: one pass over the data for each
    bit, each a plain reduction, which devices that share the data do together.
    """
    bits = 8 * values[0].dtype.itemsize - 1
    one = values[0].dtype.type(1)

    def find(step: jax.Array, limit: jax.Array) -> jax.Array:
        candidate = limit | (one << (bits - 1 - step).astype(limit.dtype))
        enough = at_least(total([_count(v >= candidate) for v in values]), k)
        return jnp.where(enough, candidate, limit)

    return jax.lax.fori_loop(0, bits, find, jnp.zeros((), values[0].dtype))


def wide(count: int | jax.Array) -> Wide:
    """Returns a count below 2**48, or a uint32, as a pair."""
    return jnp.uint32(count >> 16), jnp.uint32(count & 0xFFFF)


def total(counts: Sequence[jax.Array]) -> Wide:
    """Returns the sum of up to 2**16 counts, each a uint32."""
    high = sum((count >> 16 for count in counts), jnp.uint32(0))
    low = sum((count & 0xFFFF for count in counts), jnp.uint32(0))
    return high + (low >> 16), low & 0xFFFF


def minus(one: Wide, other: Wide) -> Wide:
    """Returns the difference of two counts, the first the larger."""
    borrow = (one[1] < other[1]).astype(jnp.uint32)
    return one[0] - other[0] - borrow, (one[1] - other[1]) & 0xFFFF


def at_least(one: Wide, other: Wide) -> jax.Array:
    """Tells whether a count reaches another."""
    return (one[0] > other[0]) | ((one[0] == other[0]) & (one[1] >= other[1]))


def _at_most(count: Wide, number: jax.Array) -> jax.Array:
    """Returns the smaller of a count and a uint32."""
    return jnp.where(at_least(count, wide(number)), number, (count[0] << 16) | count[1])


def _count(mask: jax.Array) -> jax.Array:
    return mask.sum(dtype=jnp.uint32)


def _ordered(array: jax.Array, double: bool) -> jax.Array:
    """Returns integers in the order of the magnitudes: the bits of a float without its sign."""
    if double:
        return jax.lax.bitcast_convert_type(jnp.abs(array.astype(jnp.float64)), jnp.uint64)
    return jax.lax.bitcast_convert_type(jnp.abs(array), jnp.uint32)
