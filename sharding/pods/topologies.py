"""TPU slices by name, such as ``v5e:16x16``, and their devices for a compilation without a TPU."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lamina.sharding.pods.chips import CHIPS, Chip
from lamina.sharding.pods.torus import Layout


class Topology(NamedTuple):
    """One or several slices of a pod.

    Attributes:
        name: of a slice, as Google Cloud has it: chip and chips along each axis.
        chip: what it is made of.
        extents: chips along each axis.
        slices: how many slices, joined by the data-centre network.
    """

    name: str
    chip: Chip
    extents: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return math.prod(self.extents) * self.slices


def topology(name: str, slices: int = 1) -> Topology:
    """Returns the topology of a name.

    Args:
        name: such as "v5e:4x4" or "v5p:8x8x8".
        slices: number of slices.

    Raises:
        ValueError: there is no such slice.
    """
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.strip().lower())
    if found is None:
        raise ValueError(f"topology {name!r} should be a chip and its numbers, as in v5e:16x16")
    kind, numbers = found.groups()
    if kind not in CHIPS:
        raise ValueError(f"topology {name!r}: no chip {kind!r} is known, only {', '.join(CHIPS)}")
    chip = CHIPS[kind]
    extents = tuple(int(n) for n in numbers.split("x"))
    if len(extents) != len(chip.largest):
        example = "x".join(["4"] * len(chip.largest))
        raise ValueError(
            f"topology {name!r}: slices of {kind} have {len(chip.largest)} axes, as in "
            f"{kind}:{example}"
        )
    if any(not 1 <= n <= most for n, most in zip(extents, chip.largest, strict=True)):
        most = "x".join(map(str, chip.largest))
        raise ValueError(f"topology {name!r}: a slice of {kind} has at most {most} chips")
    if slices < 1:
        raise ValueError(f"slices = {slices} should be at least 1")
    return Topology(f"{kind}:{numbers}", chip, extents, slices)


def compiler_missing() -> bool:
    """Whether the TPU compiler (the ``libtpu`` wheel) isn't installed."""
    return importlib.util.find_spec("libtpu") is None


def devices(wanted: Topology) -> Sequence[Any]:
    """Returns the devices of a topology: to compile for, not to compute with.

    It tells libtpu, through the process's environment, that there is no TPU here; call it before
    anything else loads libtpu.

    Raises:
        ValueError: libtpu knows no such slice.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", wanted.chip.accelerator)
    more: dict[str, Any] = {"num_slices": wanted.slices} if wanted.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=wanted.name, **more
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"topology {wanted.name!r}: libtpu refuses it: {reason}") from error
    return found


def layout(mesh: Mesh, wanted: Topology) -> Layout:
    """Returns where the devices of a mesh stand in a topology."""
    chip = wanted.chip
    cores = mesh.size // wanted.chips
    if cores > 1:  # the cores of a chip share its memory and its links
        chip = chip._replace(
            flops=chip.flops / cores,
            memory=chip.memory / cores,
            usable=chip.usable / cores,
            bandwidth=chip.bandwidth / cores,
            link=chip.link / cores,
            network=chip.network / cores,
        )
    places = [
        (getattr(device, "slice_index", 0) or 0, *device.coords) for device in mesh.devices.flat
    ]
    extents = (*wanted.extents, 1, 1)[:3]
    return Layout(chip, dict(mesh.shape), np.asarray(places, int), extents)
