"""Reading a checkpoint's arrays: every process reads what its devices need, in bounded memory.

An array is stored in chunks (`arrays.py`). Each chunk that overlaps a shard of this process is read
once, whatever the mesh, and copied from there to all shards that need a part of it. What is read
but not yet on its device is limited to a sixteenth of the whole (16 MB at least), and large shards
go to their device in parts, so that a restore needs little more memory than its result.
"""

import collections
import contextlib
import ctypes
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from jax.sharding import Sharding, SingleDeviceSharding

from lamina.platform.checkpoints.failures import cause

_IN_FLIGHT = 16 << 20  # bytes that may be read but not yet placed, at least
_SHARE = 16  # ... or this part of all that is read
_PIECE = 8 << 20  # shards larger than this go to their device in pieces
_CACHE = 4 << 20  # bytes of the store's index that are kept

Box = tuple[tuple[int, int], ...]
"""(start, stop) in each dimension."""


class UnreadableError(Exception):
    """The stored arrays can't be read; the message says why in one line."""


class Wanted(NamedTuple):
    """An array to read.

    Attributes:
        path: in the store.
        data: its shape and dtype.
        sharding: where it goes; None for a numpy array on the host.
    """

    path: str
    data: jax.ShapeDtypeStruct
    sharding: Sharding | None


def read(folder: epath.Path, wanted: Mapping[str, Wanted]) -> dict[str, jax.Array | np.ndarray]:
    """Reads arrays, unverified.

    Args:
        folder: of the checkpoint.
        wanted: name to what is wanted.

    Raises:
        UnreadableError: a file is missing, cut short or otherwise unreadable, or an array has
            another shape or dtype than is said.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    base = os.fspath(folder)
    base = base if "://" in base else f"file://{base}"
    opened = {
        name: ts.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": f"{base}/", "path": f"{want.path}/"},
            },
            open=True,
            context=context,
        )
        for name, want in wanted.items()
    }
    arrays = {}
    for name, want in wanted.items():
        array = _result(opened[name])
        if array.shape != want.data.shape or array.dtype.numpy_dtype != want.data.dtype:
            raise UnreadableError(
                f"{name} is stored as {array.dtype.numpy_dtype}{list(array.shape)}, and recorded "
                f"as {want.data.dtype}{list(want.data.shape)}"
            )
        arrays[name] = _Assembly(array, want)
    limit = max(_IN_FLIGHT, sum(assembly.nbytes for assembly in arrays.values()) // _SHARE)
    pending: collections.deque[tuple[_Read, Any]] = collections.deque()
    in_flight = since = 0
    for step in itertools.chain.from_iterable(a.reads() for a in arrays.values()):
        while pending and in_flight + step.nbytes > limit:
            freed = _finish(*pending.popleft())
            in_flight, since = in_flight - freed, since + freed
            if since > _PIECE:
                _give_back()
                since = 0
        pending.append((step, step.start()))
        in_flight += step.nbytes
    while pending:
        _finish(*pending.popleft())
    _give_back()
    return {name: assembly.result() for name, assembly in arrays.items()}


def _give_back() -> None:
    """Has glibc return freed memory to the system: its threads' heaps keep megabytes each."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _result(future: Any) -> Any:
    try:
        return future.result()
    except Exception as error:  # whatever a damaged file provokes below
        reason = cause(error)
    raise UnreadableError(reason)


class _Read(NamedTuple):
    """A part of a chunk that is read at once, and the pieces that take something from it."""

    assembly: "_Assembly"
    box: Box
    pieces: tuple["_Piece", ...]

    @property
    def nbytes(self) -> int:
        return _volume(self.box) * self.assembly.itemsize

    def start(self) -> Any:
        """Begins to read."""
        return self.assembly.stored[_slices(self.box)].read()


def _finish(step: _Read, future: Any) -> int:
    """Hands what was read to its pieces; returns the bytes that are free again."""
    block = _result(future)
    for piece in step.pieces:
        step.assembly.fill(piece, step.box, block)
    return step.nbytes


class _Piece:
    """A part of a shard (rows of it, or all) on its way through the host."""

    def __init__(self, box: Box, shard: Box, devices: list[jax.Device]):
        self.box, self.shard, self.devices = box, shard, devices
        self.reads = 0  # that still have to come
        self.buffer: np.ndarray | None = None


class _Assembly:
    """An array that is being put together."""

    def __init__(self, stored: Any, want: Wanted):
        self.stored, self.want = stored, want
        self.itemsize = want.data.dtype.itemsize
        self.pieces = list(self._cut())
        self.nbytes = sum(
            _volume(piece.box) * self.itemsize * max(1, len(piece.devices)) for piece in self.pieces
        )
        self._shards: dict[jax.Device, jax.Array] = {}
        self._host: np.ndarray | None = None

    def _cut(self) -> Iterator[_Piece]:
        shape, sharding = self.want.data.shape, self.want.sharding
        whole = tuple((0, extent) for extent in shape)
        if sharding is None:
            yield _Piece(whole, whole, [])
            return
        owners: dict[Box, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            parts = zip(index or (), shape, strict=True)
            box = tuple(part.indices(extent)[:2] for part, extent in parts)
            owners.setdefault(box, []).append(device)
        for shard, devices in owners.items():
            row = _volume(shard[1:]) * self.itemsize
            rows = max(_PIECE // max(row, 1), 1)
            first, last = shard[0] if shard else (0, 1)
            if last - first <= rows:
                yield _Piece(shard, shard, devices)
                continue
            for start in range(first, last, rows):
                box = ((start, min(start + rows, last)), *shard[1:])
                yield _Piece(box, shard, devices)

    def reads(self) -> Iterator[_Read]:
        """All that has to be read, each chunk once."""
        chunk = self.stored.chunk_layout.read_chunk.shape or ()  # of a scalar
        by_cell: dict[tuple[int, ...], list[_Piece]] = {}
        for piece in self.pieces:
            spans = [
                range(start // size, -(-stop // size))
                for (start, stop), size in zip(piece.box, chunk, strict=True)
            ]
            for cell in itertools.product(*spans):
                by_cell.setdefault(cell, []).append(piece)
                piece.reads += 1
        for cell in sorted(by_cell):
            inside = tuple((i * size, (i + 1) * size) for i, size in zip(cell, chunk, strict=True))
            parts = [_overlap(inside, piece.box) for piece in by_cell[cell]]
            box = tuple(
                (min(start for start, _ in spans), max(stop for _, stop in spans))
                for spans in zip(*parts, strict=True)
            )
            yield _Read(self, box, tuple(by_cell[cell]))

    def fill(self, piece: _Piece, box: Box, block: np.ndarray) -> None:
        """Copies what a piece needs from a block, and places the piece when it is complete."""
        if piece.buffer is None:
            shape = tuple(stop - start for start, stop in piece.box)
            piece.buffer = np.empty(shape, self.want.data.dtype)
        common = _overlap(box, piece.box)
        piece.buffer[_slices(common, piece.box)] = block[_slices(common, box)]
        piece.reads -= 1
        if not piece.reads:
            self._place(piece, piece.buffer)
            piece.buffer = None

    def _place(self, piece: _Piece, values: np.ndarray) -> None:
        if self.want.sharding is None:
            self._host = values
            return
        for device in piece.devices:
            place = SingleDeviceSharding(device, memory_kind=self.want.sharding.memory_kind)
            part = jax.device_put(values, place)
            if piece.box != piece.shard:
                whole = self._shards.get(device)
                if whole is None:
                    shape = tuple(stop - start for start, stop in piece.shard)
                    whole = jnp.zeros(shape, part.dtype, device=place)
                part = _insert(whole, part, piece.box[0][0] - piece.shard[0][0])
            self._shards[device] = part
            part.block_until_ready()  # then the host's memory is free again

    def result(self) -> jax.Array | np.ndarray:
        """The array, once all is read."""
        sharding, shape = self.want.sharding, self.want.data.shape
        if sharding is None:
            assert self._host is not None
            return self._host
        devices = sharding.addressable_devices_indices_map(shape)
        shards = [self._shards.pop(device) for device in devices]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


@partial(jax.jit, donate_argnums=0)
def _insert(whole: jax.Array, part: jax.Array, row: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, row, axis=0)


def _overlap(one: Box, other: Box) -> Box:
    return tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))


def _slices(box: Box, origin: Box | None = None) -> tuple[slice, ...]:
    """The box as an index into an array whose first element stands at the start of `origin`."""
    starts = [start for start, _ in origin] if origin else [0] * len(box)
    return tuple(slice(a - s, b - s) for (a, b), s in zip(box, starts, strict=True))


def _volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)
