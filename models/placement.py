"""Where a model runs: the platform it is compiled for, and how its activations lie on a mesh.

A module knows nothing of meshes. It names the dimensions of its main activations, and what is
around the call says where these names lie. Without that the partitioner is free to split
activations as it has found the parameters split, and computes every example on every device.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.models import axes

BATCH = "batch"
"""The examples."""
STREAM = "stream"
"""Places of a sequence in the residual stream, between blocks."""
LENGTH = "length"
"""Places of a sequence inside a block."""

VOCABULARY = frozenset({BATCH, STREAM, LENGTH, axes.HEADS, axes.KV_HEADS, axes.MLP, axes.VOCAB})
"""The names of activations' dimensions; hidden ones have those of the parameters' logical axes."""


class Placement(NamedTuple):
    """Where a model runs.

    Attributes:
        platform: for which it is compiled: "cpu", "gpu" or "tpu".
        mesh: its devices.
        axes: name of an activation's dimension to the mesh axes that split it. How a dimension
            lies whose name isn't here is left to the compiler.
    """

    platform: str
    mesh: Mesh
    axes: Mapping[str, tuple[str, ...]]


_IN_FORCE: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement")


def in_force() -> Placement | None:
    """Returns the placement of the call that is being traced; None outside of `use`."""
    return _IN_FORCE.get(None)


@contextlib.contextmanager
def use(placement: Placement) -> Iterator[None]:
    """Puts a placement in force while a model is traced."""
    token = _IN_FORCE.set(placement)
    try:
        yield
    finally:
        _IN_FORCE.reset(token)


def platform() -> str:
    """Returns the platform that the code being traced is compiled for."""
    placement = in_force()
    return jax.default_backend() if placement is None else placement.platform


def single_device() -> bool:
    """Whether what is being traced runs on one device."""
    placement = in_force()
    return jax.device_count() == 1 if placement is None else placement.mesh.size == 1


def partition_spec(shape: tuple[int, ...], *names: str | None) -> P:
    """Returns how the placement in force splits an activation.

    A dimension that doesn't divide (a last, small batch) isn't split.

    Args:
        shape: of the activation.
        *names: of its dimensions; None is never split.
    """
    placement = in_force()
    if placement is None:
        return P()
    sizes, parts = placement.mesh.shape, []
    for size, name in zip(shape, names, strict=True):
        if name is not None and name not in placement.axes:
            parts.append(P.UNCONSTRAINED)
            continue
        split = tuple(a for a in placement.axes.get(name or "", ()) if sizes[a] > 1)
        fits = size % math.prod(sizes[a] for a in split) == 0
        parts.append(split if split and fits else None)
    return P(*parts)


class Seen(NamedTuple):
    """An activation that a model has placed.

    Attributes:
        names: of its dimensions.
        shape: its shape.
        dtype: its dtype.
        spec: how it is split.
        partial: mesh axes of which each device had a summand before it was placed.
    """

    names: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: str
    spec: P
    partial: tuple[str, ...]


_SEEN: contextvars.ContextVar[list[Seen] | None] = contextvars.ContextVar("seen", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Seen]]:
    """Gives the list to which `constrain` adds while models are traced."""
    seen: list[Seen] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def constrain(x: jax.Array, *names: str | None, summed: str = "") -> jax.Array:
    """Returns `x`, split as the placement in force says.

    Args:
        x: an activation.
        *names: of its dimensions, such as `BATCH`; None is never split.
        summed: the dimension over which `x` has just been summed: along what splits it every
            device has a summand, so that here is a reduction. Default: "", none that is split.
    """
    placement = in_force()
    if placement is None or placement.mesh.size == 1:
        return x
    spec = partition_spec(x.shape, *names)
    seen = _SEEN.get()
    if seen is not None:
        over = placement.axes.get(summed, ())
        partial = tuple(axis for axis in over if placement.mesh.shape[axis] > 1)
        seen.append(Seen(names, x.shape, str(x.dtype), spec, partial))
    return jax.lax.with_sharding_constraint(x, NamedSharding(placement.mesh, spec))
