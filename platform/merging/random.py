"""Random bits that are a pure function of (key, place), in numpy and in jax alike.

Threefry-2x32 with 20 rounds (Salmon et al. 2011), the generator of `jax.random`: the bits of place
`i` are those of `jax.random.bits(key, (n,), "uint32")[i]`, but any piece of them can be drawn by
itself, so that they depend neither on the pieces nor on the devices.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lamina.platform.merging.method import Array, Drop, Numbers

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA

_AT_ONCE = 1 << 14
"""Numbers that are drawn at once of several models: of small tensors, where numpy's calls cost more
than what they compute."""


def tensor_keys(seed: int, paths: Sequence[str], models: int) -> np.ndarray:
    """Returns the keys of tensors, from the seed, their paths and the models' numbers.

    Args:
        seed: of all.
        paths: of the tensors.
        models: how many models there are.

    Returns:
        uint32 [paths, models, 2].
    """
    checks = np.asarray([zlib.crc32(path.encode()) for path in paths], np.uint32)[:, None]
    low, high = np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32 & 0xFFFFFFFF)
    numbers = np.arange(models, dtype=np.uint32)
    words = np.full_like(checks, low), checks
    return np.stack(_threefry(np, words, np.full_like(numbers, high), numbers), -1)


def keeps(xp: Numbers, keys: np.ndarray, places: Any, density: float) -> Array:
    """Returns for each key and place whether it stays, with probability `density`.

    Args:
        xp: numpy or jax.numpy.
        keys: uint32 [..., 2], from `tensor_keys`.
        places: uint32 [n], or (high, low) words of places beyond 2**32.
        density: probability, in (0, 1]; it is rounded to a multiple of 2**-32.

    Returns:
        bool [..., n].
    """
    high, low = places if isinstance(places, tuple) else (xp.zeros_like(places), places)
    if density >= 1:
        return xp.ones((*keys.shape[:-1], *low.shape), bool)
    words = keys[..., :1], keys[..., 1:]
    first, second = _threefry(xp, words, high, low)
    return (first ^ second) < np.uint32(min(round(density * 2**32), 2**32 - 1))


def drop(how: Drop, keys: np.ndarray, place: int, values: Sequence[np.ndarray]) -> None:
    """Sets the entries that don't stay to zero, in place.

    Args:
        how: with which probability.
        keys: of the tensor, uint32 [models, 2].
        place: in the tensor, of the first entry.
        values: for each model entries [n] that follow each other.
    """
    size = values[0].size
    places = np.arange(place, place + size, dtype=np.uint64)
    words = ((places >> np.uint64(32)).astype(np.uint32), places.astype(np.uint32))
    step = max(_AT_ONCE // max(size, 1), 1)
    for first in range(0, len(values), step):
        stays = keeps(np, keys[first : first + step], words, how.density)
        for value, kept in zip(values[first : first + step], stays, strict=True):
            np.multiply(value, kept, out=value)


def _threefry(xp: Numbers, key: Any, x: Array, y: Array) -> tuple[Array, Array]:
    """`key` are arrays and no scalars, whose overflow numpy would warn of."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(_PARITY))
    x, y = x + schedule[0], y + schedule[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x = x + y
            y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
            y = y ^ x
        x = x + schedule[(block + 1) % 3]
        y = y + (schedule[(block + 2) % 3] + np.uint32(block + 1))
    return x, y
