"""Reading and writing a checkpoint's arrays through Orbax: plain nested dicts of plain arrays.

The train state is stored as nested dicts by name ('/'-joined, see names.py), so any Orbax reader
opens it without Lamina's classes; our own reading is in reading.py. Typed keys are stored as their
uint32 words. Orbax refuses arrays without elements: they stand in the manifest only.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Sharding

from lamina.platform.checkpoints import quiet, reading
from lamina.platform.checkpoints.manifest import ArrayRecord, is_key
from lamina.platform.checkpoints.names import nest

if TYPE_CHECKING:  # slow to import, and what doesn't save doesn't need it
    import orbax.checkpoint as ocp

_CHUNK = 4 << 20  # bytes of a chunk, at most
_CRUMB = 1 << 19  # shards whose chunks would be smaller than this are not cut


def data_of(name: str, leaf: Any) -> jax.Array:
    """The plain array that stands for a leaf of a train state.

    Raises:
        TypeError: the leaf is no `jax.Array`, or one that other processes can't see.
    """
    if not isinstance(leaf, jax.Array):
        raise TypeError(
            f"the leaf {name} of the train state is a {type(leaf).__name__}; checkpoints hold "
            "jax.Arrays only (wrap it in jnp.asarray)"
        )
    if jax.process_count() > 1 and leaf.is_fully_addressable:
        raise TypeError(
            f"the leaf {name} lives in one process only; with several processes every array of "
            "the train state must be placed on the mesh of all of them"
        )
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def private_copies(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Arrays that stay intact when the caller donates the originals.

    On CPU, host memory is the device's memory and Orbax writes straight from it, so they are copied
    here (today's runtime declines a donation while somebody reads, but nothing promises it), by one
    program for each set of devices. On other devices Orbax copies to the host before its save call
    returns.
    """
    groups: dict[frozenset, dict[str, jax.Array]] = {}
    for name, array in arrays.items():
        groups.setdefault(frozenset(array.sharding.device_set), {})[name] = array
    copies = dict(arrays)
    for devices, group in groups.items():
        if all(device.platform == "cpu" for device in devices):
            copies |= _copied(group)
    return copies


@jax.jit
def _copied(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.copy, arrays)


def handler() -> "ocp.PyTreeCheckpointHandler":
    """The Orbax handler of the arrays.

    Compression is off: on float32 parameters it saves 8% of the size for 25% more time of the
    cores that the training on CPU needs.
    """
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(use_compression=False)


def checkpointer(timeout: float) -> "ocp.AsyncCheckpointer":
    """The Orbax checkpointer that writes in the background.

    It creates its folders before `save` returns. Orbax can do this in the background too, but then
    a folder that can't be created leaves threads that hold up the end of the process.

    Args:
        timeout: seconds that processes wait for each other.
    """
    import orbax.checkpoint as ocp

    quiet.down()
    options = ocp.options.AsyncOptions(
        timeout_secs=int(timeout), create_directories_asynchronously=False
    )
    return ocp.AsyncCheckpointer(handler(), async_options=options)


def _escape(name: str) -> str:
    """Orbax joins the parts of a name by dots, so dots inside a part are escaped."""
    return name.replace("%", "%25").replace(".", "%2E")


def _stored_name(name: str) -> str:
    return _escape(name).replace("/", ".")


def save_args(arrays: Mapping[str, jax.Array]) -> "ocp.args.PyTreeSave":
    """Orbax's arguments to save named arrays."""
    import orbax.checkpoint as ocp

    full = {_escape(name): array for name, array in arrays.items() if array.size}
    options = {name: ocp.SaveArgs(chunk_byte_size=chunk_bytes(a)) for name, a in full.items()}
    return ocp.args.PyTreeSave(nest(full), save_args=nest(options))


def chunk_bytes(array: jax.Array) -> int | None:
    """Bytes of the chunks that an array is stored in; None stores each shard as one.

    Chunks let another mesh read its own parts. Orbax cuts a shard along its dimensions, the split
    ones first, into equal parts, the largest dimension by its next smaller divisor each time; where
    that leads to crumbs, as with dimensions that are primes, chunks may be larger, or the shard
    stays whole.
    """
    for limit in (_CHUNK, 2 * _CHUNK, 4 * _CHUNK):
        if _cut_to(array, limit) >= _CRUMB:
            return limit
    return None


def _cut_to(array: jax.Array, limit: int) -> int:
    """Bytes of the chunks that Orbax makes of an array for a limit."""
    shard = array.sharding.shard_shape(array.shape)
    split = [part != whole for part, whole in zip(shard, array.shape, strict=True)]
    extents = list(shard)
    while math.prod(extents) * array.dtype.itemsize > limit:
        able = [d for d, extent in enumerate(extents) if extent > 1 and split[d]]
        if not able:
            split = [True] * len(extents)
            continue
        d = max(able, key=lambda d: extents[d])
        extents[d] = _next_divisor(shard[d], extents[d])
    return math.prod(extents) * array.dtype.itemsize


def _next_divisor(number: int, below: int) -> int:
    """The largest divisor of a number that is smaller than `below`."""
    return max(
        d
        for small in range(1, math.isqrt(number) + 1)
        if number % small == 0
        for d in (small, number // small)
        if d < below
    )


def read(
    folder: epath.Path,
    records: Mapping[str, ArrayRecord],
    shardings: Mapping[str, Sharding | None],
) -> dict[str, jax.Array | np.ndarray]:
    """Reads the stored data of some arrays of a checkpoint, unverified.

    Args:
        folder: the step's folder.
        records: name to record, of the arrays to read (any part of what is stored).
        shardings: where each goes; None for a numpy array on the host.

    Returns:
        Name to data; typed keys as uint32 words.

    Raises:
        UnreadableError: a file is missing, cut short or otherwise unreadable.
    """
    wanted, result = {}, {}
    for name, record in records.items():
        data, sharding = record.data(), shardings[name]
        if 0 in data.shape:
            empty = np.zeros(data.shape, data.dtype)
            result[name] = empty if sharding is None else _place(empty, sharding)
        else:
            wanted[name] = reading.Wanted(_stored_name(name), data, sharding)
    return result | reading.read(folder, wanted)


def _place(value: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def as_leaf(data: jax.Array | np.ndarray, record: ArrayRecord) -> jax.Array | np.ndarray:
    """The leaf that stored data stand for: typed keys are wrapped again."""
    if not record.key_impl:
        return data
    return jax.random.wrap_key_data(jnp.asarray(data), impl=record.key_impl)


def check_data(data: jax.Array | np.ndarray, record: ArrayRecord) -> bool:
    """Whether what was read has the recorded shape and dtype."""
    wanted = record.data()
    return tuple(data.shape) == wanted.shape and data.dtype == wanted.dtype
