"""Figures of TPU chips, in one table with their sources."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """What one chip can do.

    Attributes:
        kind: as in the name of a topology.
        flops: peak, bfloat16 FLOP/s.
        memory: HBM in bytes, as sold.
        usable: HBM in bytes that a program may take.
        bandwidth: of HBM, bytes/s.
        link: of one link between neighbours (ICI), bytes/s in one direction.
        largest: chips along each axis of the largest slice.
        ring: an axis of a slice closes to a ring if its length is a multiple of this.
        network: between slices (DCN), bytes/s of one chip.
        accelerator: some accelerator type of Google Cloud, which libtpu wants to be told.
        source: where the figures come from.
    """

    kind: str
    flops: float
    memory: float
    usable: float
    bandwidth: float
    link: float
    largest: tuple[int, ...]
    ring: int
    network: float
    accelerator: str
    source: str


_DOCS = (
    "compute and HBM: Google Cloud documentation, 'TPU {}'; links, network and rings: Austin et "
    "al. 2025, 'How to Scale Your Model', section 'TPUs'"
)
_REFUSED = "; usable HBM: the compiler's message when a program is too large (libtpu 0.0.52)"
_ASSUMED = "; usable HBM: assumed to be all but 0.25 GiB, as on v5e"

CHIPS: dict[str, Chip] = {
    chip.kind: chip
    for chip in (
        Chip(
            kind="v4",
            flops=275e12,
            memory=32 * GIB,
            usable=31.75 * GIB,
            bandwidth=1.2e12,
            link=45e9,
            largest=(12, 16, 16),
            ring=4,
            network=6.25e9,
            accelerator="v4-8",
            source=_DOCS.format("v4") + _ASSUMED,
        ),
        Chip(
            kind="v5e",
            flops=197e12,
            memory=16 * GIB,
            usable=15.75 * GIB,
            bandwidth=819e9,
            link=45e9,
            largest=(16, 16),
            ring=16,
            network=3.125e9,
            accelerator="v5litepod-16",
            source=_DOCS.format("v5e") + _REFUSED,
        ),
        Chip(
            kind="v5p",
            flops=459e12,
            memory=95 * GIB,
            usable=94.75 * GIB,
            bandwidth=2765e9,
            link=90e9,
            largest=(16, 16, 24),
            ring=4,
            network=6.25e9,
            accelerator="v5p-8",
            source=_DOCS.format("v5p") + _ASSUMED,
        ),
        Chip(
            kind="v6e",
            flops=918e12,
            memory=32 * GIB,
            usable=31.25 * GIB,
            bandwidth=1638e9,
            link=90e9,
            largest=(16, 16),
            ring=16,
            network=12.5e9,
            accelerator="v6e-16",
            source=_DOCS.format("v6e") + _ASSUMED,
        ),
    )
}
"""Kind to chip."""
