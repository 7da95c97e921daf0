"""Where the devices of a mesh stand in the torus of a slice, and what a transfer takes there."""

from typing import NamedTuple

import numpy as np

from lamina.sharding.pods.chips import Chip

HOP = 1e-6
"""Seconds until the first byte arrives at a neighbour (Austin et al. 2025, "How to Scale Your
Model", section "TPUs")."""


class Layout(NamedTuple):
    """The devices of a mesh, in the mesh's order (which is that of a program's device numbers).

    Attributes:
        chip: what they are.
        shape: mesh axis to its size.
        coordinates: int [devices, 4]: slice, x, y, z.
        extents: chips of a slice along x, y, z.
    """

    chip: Chip
    shape: dict[str, int]
    coordinates: np.ndarray
    extents: tuple[int, ...]

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.coordinates)

    @property
    def slices(self) -> int:
        """Number of slices."""
        return len(np.unique(self.coordinates[:, 0]))

    def differing(self, members: np.ndarray) -> tuple[str, ...]:
        """Returns the mesh axes along which the devices of a row of `members` differ."""
        places = np.stack(np.unravel_index(members, tuple(self.shape.values())), axis=-1)
        varies = (places != places[:, :1]).any(axis=(0, 1))
        return tuple(name for name, does in zip(self.shape, varies, strict=True) if does)

    def slice_axes(self) -> tuple[str, ...]:
        """Returns the mesh axes that reach over slices."""
        where = self.coordinates[:, 0].reshape(tuple(self.shape.values()))
        return tuple(
            name
            for i, name in enumerate(self.shape)
            if (where != np.take(where, [0], axis=i)).any()
        )


def transfer_seconds(kind: str, size: float, members: np.ndarray, layout: Layout) -> float:
    """Returns the least time of a collective on the links of the torus.

    All torus axes along which a group extends work at once. An axis that is a whole ring carries in
    both directions, so twice a link's bandwidth; an open one is limited by the links at its ends.
    Groups that take every other chip share their links.

    Args:
        kind: of the collective.
        size: bytes, as `Collective.bytes`.
        members: int [groups, members] of one group; of a permutation (source, target) pairs.
        layout: where the devices stand.
    """
    at = layout.coordinates[members]
    chip = layout.chip
    if kind == "collective-permute":
        if (at[:, 0, 0] != at[:, 1, 0]).any():
            return size / chip.network
        hops = _distances(at[:, 0, 1:], at[:, 1, 1:], layout).sum(axis=-1).max(initial=0)
        return size * hops / chip.link + hops * HOP
    group = at[0]
    count = len(group)
    if len(np.unique(group[:, 0])) > 1:
        return (count - 1) / count * size / chip.network
    bandwidth, hops, widest = 0.0, 0, 0.0
    for axis, extent in enumerate(layout.extents, start=1):
        places = np.unique(group[:, axis])
        length = len(places)
        if length < 2:
            continue
        stride = int(np.diff(places).min())
        closed = length * stride == extent and extent % chip.ring == 0
        each = chip.link * (2 if closed else 1) / stride
        bandwidth += each
        hops += length // 2 if closed else length - 1
        widest = max(widest, length / (4 * each))
    if not bandwidth:
        return 0.0
    if kind in ("all-to-all", "ragged-all-to-all"):
        return size * widest + hops * HOP
    passes = 2 if kind == "all-reduce" else 1
    return passes * ((count - 1) / count * size / bandwidth + hops * HOP)


def _distances(source: np.ndarray, target: np.ndarray, layout: Layout) -> np.ndarray:
    """Returns the hops along each axis, round the ring where that is shorter."""
    direct = np.abs(source - target)
    extents = np.asarray(layout.extents)
    ring = (extents % layout.chip.ring == 0) & (extents > 2)
    return np.where(ring, np.minimum(direct, extents - direct), direct)
