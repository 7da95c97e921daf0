"""The device mesh of a run, from the sizes of its named axes."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("seed", "data", "fsdp", "tensor")
"""Axis names, slowest first: neighbours on the last axis are the closest devices."""

BATCH_AXES = ("data", "fsdp")
"""Axes over which the rows of a batch are split."""


def create(
    devices: Sequence[jax.Device],
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    seed: int = 1,
) -> Mesh:
    """Returns a mesh of all `devices` with the axes `AXES`.

    Args:
        devices: the devices to use, all of them.
        data: ways to split the batch; parameters are copied along it.
        fsdp: ways to split the batch and, with the `fsdp` rules, the parameters.
        tensor: ways to split single layers.
        seed: ways to split the seeds of a run of several.
        One size may be -1: what the others leave.

    Raises:
        ValueError: the sizes don't multiply to the number of devices.
    """
    sizes = {"seed": seed, "data": data, "fsdp": fsdp, "tensor": tensor}
    count = len(devices)
    for name, size in sizes.items():
        if size == 0 or size < -1:
            raise ValueError(
                f"mesh.{name} = {size} should be a positive number, or -1 for the rest"
            )
    unknown = [name for name, size in sizes.items() if size == -1]
    if len(unknown) > 1:
        raise ValueError(f"mesh: only one axis may be -1, not {' and '.join(unknown)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if unknown:
        if count % fixed:
            raise ValueError(
                f"mesh: {_shown(sizes)} leaves no whole size for {unknown[0]!r}: the other axes "
                f"multiply to {fixed}, which doesn't divide the {count} devices"
            )
        sizes[unknown[0]] = count // fixed
    elif fixed != count:
        raise ValueError(
            f"mesh: {_shown(sizes)} needs {fixed} devices, but there are {count}: "
            f"set one axis to -1, or sizes that multiply to {count}"
        )
    shape = tuple(sizes[name] for name in AXES)
    types = (AxisType.Auto,) * len(AXES)
    if list(devices) == jax.devices():
        return jax.make_mesh(shape, AXES, types)  # orders the devices after their interconnect
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=types)


def batch_parallelism(mesh: Mesh) -> int:
    """Returns the number of parts into which `mesh` splits a batch."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def _shown(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "all axes 1"
