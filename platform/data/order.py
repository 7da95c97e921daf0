"""The order of examples: a pure function of (number of examples, seed, position).

A position counts examples from the start of a run: `position = step * batch_size + row`. Position
`p` lies in epoch `p // n`, and each epoch is one permutation of all `n` examples, so every example
is read exactly once an epoch. Batches straddle the end of an epoch: nothing is dropped. Because
the order needs no state, reading from any step is the same as having read from the start.
"""

import functools

import numpy as np

_SMALL = 65536
_SEED_BITS = 64


def indices(n: int, seed: int, first_position: int, count: int) -> np.ndarray:
    """Returns the example at each of `count` positions, from `first_position` on.

    Epoch `e` is `Generator(Philox(key=(seed, e))).permutation(n)`.

    Args:
        n: number of examples, at least 1.
        seed: data seed (any integer; taken modulo 2^64).
        first_position: first position of the stream, from 0.
        count: how many positions.

    Returns:
        int64 [count], values in [0, n).

    Raises:
        ValueError: `n` is below 1, or `first_position` or `count` is negative.

    Example:
        >>> sorted(indices(5, seed=0, first_position=10, count=5).tolist())
        [0, 1, 2, 3, 4]
    """
    if n < 1:
        raise ValueError(f"an order needs at least one example, got n={n}")
    if first_position < 0 or count < 0:
        raise ValueError(f"negative position: first_position={first_position}, count={count}")
    result = np.empty(count, np.int64)
    done = 0
    while done < count:
        epoch, start = divmod(first_position + done, n)
        part = permutation(n, seed, epoch)[start : start + count - done]
        result[done : done + len(part)] = part
        done += len(part)
    return result


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the (cached, read-only) order of epoch `epoch`: int32 or int64 [n]."""
    cached = _small_permutation if n <= _SMALL else _large_permutation
    return cached(n, seed % 2**_SEED_BITS, epoch)


def seed_for(data_seed: int, seed: int) -> int:
    """Returns the order seed of one of several seeds that each have their own order.

    Args:
        data_seed: the config's `data.seed`.
        seed: the value of the training seed.

    Returns:
        An integer in [0, 2^64) that depends on both values.
    """
    words = [data_seed % 2**_SEED_BITS, seed % 2**_SEED_BITS]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    key = np.array([seed, epoch], np.uint64)
    result = np.random.Generator(np.random.Philox(key=key)).permutation(n)
    result = result.astype(np.int32 if n < 2**31 else np.int64)
    result.flags.writeable = False
    return result


# Many seeds over a small data set keep an entry each (at most 64 MiB in all); for large data sets
# an entry is megabytes, and two epochs of one seed are all that a batch can touch.
_small_permutation = functools.lru_cache(maxsize=256)(_permutation)
_large_permutation = functools.lru_cache(maxsize=4)(_permutation)
