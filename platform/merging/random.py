"""Random bits that are a pure function of (key, place), in numpy and in jax alike.

Threefry-2x32 with 20 rounds (Salmon et al. 2011), the generator of `jax.random`: the bits of place
`i` are those of `jax.random.bits(key, (n,), "uint32")[i]`, but any piece of them can be drawn by
itself, so that they depend neither on the pieces nor on the devices.
"""

import zlib
from typing import Any

import numpy as np

from lamina.platform.merging.method import Array, Numbers

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def tensor_key(seed: int, path: str, model: int) -> tuple[int, int]:
    """Returns the key of one tensor of one model, from the seed and the tensor's path."""
    first, second = _threefry(
        np,
        (np.uint32(seed & 0xFFFFFFFF), np.uint32(zlib.crc32(path.encode()))),
        np.asarray([seed >> 32 & 0xFFFFFFFF], np.uint32),
        np.asarray([model], np.uint32),
    )
    return int(first[0]), int(second[0])


def keeps(xp: Numbers, key: tuple[int, int], places: Any, density: float) -> Array:
    """Returns for each place whether it stays, with probability `density`.

    Args:
        xp: numpy or jax.numpy.
        key: from `tensor_key`.
        places: uint32, or (high, low) words of places beyond 2**32.
        density: probability, in (0, 1]; it is rounded to a multiple of 2**-32.
    """
    high, low = places if isinstance(places, tuple) else (xp.zeros_like(places), places)
    if density >= 1:
        return xp.ones(low.shape, bool)
    words = (np.uint32(key[0]), np.uint32(key[1]))
    first, second = _threefry(xp, words, high, low)
    return (first ^ second) < np.uint32(min(round(density * 2**32), 2**32 - 1))


def _threefry(xp: Numbers, key: Any, x: Array, y: Array) -> tuple[Array, Array]:
    parity = np.uint32(int(key[0]) ^ int(key[1]) ^ _PARITY)
    schedule = (key[0], key[1], parity)
    x, y = x + schedule[0], y + schedule[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x = x + y
            y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
            y = y ^ x
        x = x + schedule[(block + 1) % 3]
        # The key's words and the count of the block are added modulo 2**32.
        y = y + np.uint32((int(schedule[(block + 2) % 3]) + block + 1) & 0xFFFFFFFF)
    return x, y
