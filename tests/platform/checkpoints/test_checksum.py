"""The checksum adds up over any partition and finds every change of one element."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lamina.platform.checkpoints import checksum

DTYPES = ["float32", "bfloat16", "float16", "uint8", "bool", "int32", "float64", "complex64"]


def values(dtype, shape):
    rng = np.random.default_rng(0)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return np.asarray(rng.integers(0, 2 if dtype == "bool" else 100, shape)).astype(kind)


def whole(array):
    return checksum.partial_sum(array, (0,) * array.ndim, array.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (130, 70), (3, 5, 7, 11), (3, 30000)])
def test_shares_of_blocks_add_up_however_the_array_is_cut(dtype, shape):
    array = values(dtype, shape)
    for axis in range(array.ndim):
        cut = array.shape[axis] // 3
        first, second = np.split(array, [cut], axis)
        start = [0] * array.ndim
        one = checksum.partial_sum(first, tuple(start), shape)
        start[axis] = cut
        two = checksum.partial_sum(second, tuple(start), shape)
        assert (one + two) % 2**64 == whole(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_flip_changes_the_sum(dtype):
    array = values(dtype, (3, 5))
    sums = {whole(array)}
    for bit in range(array.nbytes * 8):
        changed = array.copy()
        changed.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << (bit % 8)
        sums.add(whole(changed))
    assert len(sums) == array.nbytes * 8 + 1


def test_two_sign_flips_two_swapped_rows_and_a_zeroed_block_change_the_sum():
    for dtype in ("float32", "float64"):
        array = np.random.default_rng(1).normal(size=(64, 8)).astype(dtype)
        flipped = array.copy()
        flipped[3, 1] *= -1
        flipped[9, 2] *= -1
        swapped = array.copy()
        swapped[[4, 5]] = swapped[[5, 4]]
        zeroed = array.copy()
        zeroed[8:16] = 0
        assert len({whole(x) for x in (array, flipped, swapped, zeroed)}) == 4


def test_the_sum_of_a_known_array_never_changes():
    # Checkpoints on people's disks were written with these weights: a new formula needs a new
    # manifest format.
    assert whole(np.arange(70000, dtype=np.float32)) == 17130176616183006976
    assert whole(np.array(True)) == whole(np.uint8(1).reshape(()))


def test_checksums_of_device_arrays_equal_those_of_their_host_copies():
    arrays = {
        "a": jnp.arange(12.0).reshape(3, 4),
        "scalar": jnp.bfloat16(3),
        "b": jnp.zeros((0, 2)),
    }
    expected = {name: whole(np.asarray(a)) for name, a in arrays.items()}
    assert checksum.checksums(arrays) == expected
    assert {n: checksum.own_share(b) for n, b in checksum.on_host(arrays).items()} == expected
