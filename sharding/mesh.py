"""The device mesh of a run, from the sizes of its named axes."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("seed", "replica", "data", "fsdp", "expert", "sequence", "tensor")
"""Axis names, slowest first: neighbours on the last axis are the closest devices, and the first
axes are the ones that may reach over slices."""

BATCH_AXES = ("replica", "data", "fsdp", "expert")
"""Axes over which the rows of a batch are split."""

SLICE_AXES = ("seed", "replica", "data", "fsdp")
"""Axes that go over several slices where `dcn` says nothing, in this order."""


def create(
    devices: Sequence[jax.Device],
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    expert: int = 1,
    replica: int = 1,
    seed: int = 1,
    dcn: Mapping[str, Any] = MappingProxyType({}),
) -> Mesh:
    """Returns a mesh of all `devices` with the axes `AXES`.

    Sizes count all devices of an axis; one may be -1: what the others leave. Within a slice the
    devices are ordered after their interconnect (`jax.make_mesh`). Several slices, which only the
    data-centre network joins, stand next to each other along the axes of `dcn`.

    Args:
        devices: the devices to use, all of them; those of a topology that is only compiled for
            are as good as real ones.
        data: ways to split the batch; parameters are copied along it.
        fsdp: ways to split the batch and, with the `fsdp` rules, the parameters.
        tensor: ways to split single layers.
        sequence: ways to split the activations along the length of the sequences.
        expert: ways to split the batch, and experts where a model has them.
        replica: ways to split the batch between islands; like data, but outermost.
        seed: ways to split the seeds of a run of several.
        dcn: axis to the part of its size that goes over slices, such as `dict(data=2)`; the
            parts multiply to the number of slices. An axis that is -1 here and in its size stands
            for the slices alone, so that another may take the rest: `data=-1, fsdp=-1,
            dcn=dict(data=-1)`. Empty: `replica`, `data` or `fsdp` takes them. Devices that don't
            tell their slice (all but TPUs) are cut into slices in their order.

    Raises:
        ValueError: the sizes don't multiply to the number of devices, or the parts of `dcn` not
            to the number of slices; the message names the axis and sizes that would work.
    """
    sizes = {
        "data": data,
        "fsdp": fsdp,
        "tensor": tensor,
        "sequence": sequence,
        "expert": expert,
        "replica": replica,
        "seed": seed,
    }
    slices = _slices(devices, dcn)
    parts = _parts(dcn, len(slices))
    unknown = [name for name, size in sizes.items() if size == -1]
    if len(unknown) > 1:
        sizes |= {name: parts[name] for name in unknown if dcn.get(name) == -1}
    sizes = _filled(sizes, len(devices), "mesh", "devices")
    across = _across(sizes, len(slices), parts)
    within = tuple(sizes[name] // across[name] for name in AXES)
    blocks = np.array([_arranged(part, within) for part in slices], dtype=object)
    count = len(AXES)
    blocks = blocks.reshape(*across.values(), *within)
    pairs = [axis for i in range(count) for axis in (i, count + i)]
    array = blocks.transpose(pairs).reshape([sizes[name] for name in AXES])
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * count)


def batch_parallelism(mesh: Mesh) -> int:
    """Returns the number of parts into which `mesh` splits a batch."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def describe(mesh: Mesh) -> str:
    """Returns the axes of `mesh` that have more than one device, as `data=2, tensor=4`."""
    return _shown(dict(mesh.shape))


def _filled(sizes: Mapping[str, Any], count: int, key: str, things: str) -> dict[str, int]:
    """Returns `sizes` with the -1 among them replaced; they multiply to `count`."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1:
            raise ValueError(
                f"{key}.{name} = {size!r} should be a positive number, or -1 for the rest"
            )
    unknown = [name for name, size in sizes.items() if size == -1]
    if len(unknown) > 1:
        raise ValueError(f"{key}: only one axis may be -1, not {' and '.join(unknown)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if unknown and count % fixed == 0:
        return {**sizes, unknown[0]: count // fixed}
    if fixed == count and not unknown:
        return dict(sizes)
    advice = _advice(sizes, count, fixed, key)
    if unknown:
        raise ValueError(
            f"{key}: {_shown(sizes)} leaves no whole size for {unknown[0]!r}: the other axes "
            f"multiply to {fixed}, which doesn't divide the {count} {things}. {advice}"
        )
    raise ValueError(
        f"{key}: {_shown(sizes)} needs {fixed} {things}, but there are {count}. {advice}"
    )


def _advice(sizes: Mapping[str, int], count: int, fixed: int, key: str) -> str:
    """Returns for each axis that is set the sizes that would fit, the others being as they are."""
    rest = any(size == -1 for size in sizes.values())
    fitting = []
    for name in [n for n, size in sizes.items() if size > 1] or [next(iter(sizes))]:
        left, remainder = divmod(count, fixed // sizes[name])
        if not remainder:
            works = _divisors(left) if rest else [left]
            fitting.append(f"{key}.{name} = {_alternatives(works)}")
    if fitting:
        return "These would fit: " + "; ".join(fitting)
    return f"Sizes divide {count} ({_alternatives(_divisors(count))}) and multiply to it"


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _alternatives(sizes: Sequence[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} or {last}" if first else last


def _slices(devices: Sequence[jax.Device], dcn: Mapping[str, Any]) -> list[list[jax.Device]]:
    """Returns the devices slice by slice."""
    if devices[0].platform == "tpu":
        by_slice: dict[int, list[jax.Device]] = {}
        for device in devices:
            by_slice.setdefault(getattr(device, "slice_index", 0), []).append(device)
        found = [by_slice[index] for index in sorted(by_slice)]
        if len({len(part) for part in found}) > 1:
            raise ValueError(
                "mesh: the slices have different numbers of devices: "
                + ", ".join(str(len(part)) for part in found)
            )
        return found
    parts = math.prod(n for n in dcn.values() if isinstance(n, int) and n > 0)
    if len(devices) % parts:
        raise ValueError(
            f"mesh.dcn asks for {parts} slices, which doesn't divide the {len(devices)} devices"
        )
    size = len(devices) // parts
    return [list(devices[i : i + size]) for i in range(0, len(devices), size)]


def _parts(dcn: Mapping[str, Any], slices: int) -> dict[str, int]:
    """Returns `dcn` with the -1 in it replaced."""
    for name in dcn:
        if name not in AXES:
            raise ValueError(f"mesh.dcn.{name} is no axis of the mesh: one of {', '.join(AXES)}")
    return _filled(dcn, slices, "mesh.dcn", "slices") if dcn else {}


def _across(sizes: Mapping[str, int], slices: int, given: Mapping[str, int]) -> dict[str, int]:
    """Returns for each axis the part of its size that goes over slices: `given`, or a choice."""
    for name, part in given.items():
        if sizes[name] % part:
            raise ValueError(
                f"mesh.{name} = {sizes[name]} is no multiple of mesh.dcn.{name} = {part}: "
                f"use {_alternatives([part, 2 * part, 4 * part])}, or another multiple"
            )
    if given:
        return {name: given.get(name, 1) for name in AXES}
    parts = {name: 1 for name in AXES}
    left = slices
    for name in SLICE_AXES:
        parts[name] = math.gcd(sizes[name], left)
        left //= parts[name]
    if left > 1:
        raise ValueError(
            f"mesh: {_shown(sizes)} has no axis for the {slices} slices: make the product of "
            f"{', '.join(SLICE_AXES)} a multiple of {slices}, or say with mesh.dcn which axis goes "
            "over them"
        )
    return parts


def _arranged(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """Returns the devices of one slice in an array, neighbours being close."""
    types = (AxisType.Auto,) * len(shape)
    try:
        return jax.make_mesh(shape, AXES, types, devices=devices).devices
    except NotImplementedError:  # an axis is a part of a physical one
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except AssertionError:  # a selection of devices that is no cuboid: any order is as good
        return np.array(devices, dtype=object).reshape(shape)


def _shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "all axes 1"
