"""Placements in words: what each mesh axis does to an array.

The language is OneFlow's (Yuan et al. 2021, 2110.15032): along a mesh axis an array is split, S(i)
with the dimension i, or broadcast, B: every device has the same; or partial, P: every device has a
summand.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


def signature(spec: P | Sequence[Any], mesh: Mesh, partial: Collection[str] = ()) -> str:
    """Returns for each mesh axis of several devices what it does, as `data B, tensor S(1)`.

    Args:
        spec: an entry for each dimension, as in a `PartitionSpec`; the last ones may be missing.
        mesh: the mesh. Its axis `seed`, along which arrays of all seeds lie, is not shown.
        partial: the mesh axes along which the array is a sum that has not been taken.

    Returns:
        The text; "" on one device. An axis with which the compiler may do as it likes is `free`.
    """
    kinds = {}
    for dimension, entry in enumerate(spec):
        for axis in _axes(entry):
            kinds[axis] = f"S({dimension})"
    rest = "free" if any(entry is P.UNCONSTRAINED for entry in spec) else "B"
    shown = [axis for axis, size in mesh.shape.items() if size > 1 and axis != "seed"]
    return ", ".join(f"{a} {'P' if a in partial else kinds.get(a, rest)}" for a in shown)


def bytes_per_device(
    shape: Sequence[int], itemsize: int, spec: P | Sequence[Any], mesh: Mesh
) -> int:
    """Returns the bytes of an array on one device, if nothing but `spec` splits it."""
    ways = math.prod(mesh.shape[axis] for entry in spec for axis in _axes(entry))
    return math.prod(shape) * itemsize // ways


def _axes(entry: Any) -> tuple[str, ...]:
    if entry is None or entry is P.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)
