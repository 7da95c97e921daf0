"""A roofline estimate of a step: what it would take if chip, memory and links ran at their figures.

Nothing here was calibrated on a TPU: real matrix products reach perhaps 80 to 95% of the peak. So
the estimate stands between two bounds, and says which limit holds.
"""

from typing import NamedTuple

from lamina.sharding.pods.chips import Chip
from lamina.sharding.pods.collectives import CROSS_SLICE, Collective
from lamina.sharding.pods.hlo import Module
from lamina.sharding.pods.loops import Schedule
from lamina.sharding.pods.products import products
from lamina.sharding.pods.traffic import hbm_bytes

KERNEL_EFFICIENCY = 0.5
"""Share of the peak that a Pallas attention kernel is assumed to reach."""


class Work(NamedTuple):
    """What one device does in a step.

    Attributes:
        flops: of matrix products and convolutions, those in kernels included.
        kernel_flops: those in Pallas kernels, of which the HLO shows no more than the name.
        hbm_bytes: read from and written to HBM.
        seconds: if every instruction took the longer one of its computation and its transfers.
    """

    flops: float
    kernel_flops: float
    hbm_bytes: float
    seconds: float


class Estimate(NamedTuple):
    """Seconds of a step on one device.

    Attributes:
        compute: all products at the chip's peak.
        memory: all traffic at HBM's bandwidth.
        operations: instruction after instruction, each at its own limit.
        blocking: collectives on the torus during which nothing else runs.
        overlapped: collectives on the torus that run beside computation.
        network: transfers between slices, which run beside computation.
        lower: everything overlaps: the longest of the above.
        estimate: what may overlap does: `max(operations, overlapped, network) + blocking`.
        upper: nothing overlaps: the sum.
        bound: which limit holds: "compute", "HBM", "ICI" or "DCN".
    """

    compute: float
    memory: float
    operations: float
    blocking: float
    overlapped: float
    network: float
    lower: float
    estimate: float
    upper: float
    bound: str


def work(module: Module, schedule: Schedule, chip: Chip) -> Work:
    """Adds up the instructions of a schedule."""
    flops = kernels = moved = seconds = 0.0
    for visit in schedule.visits:
        found = products(module, visit.computation, visit.instruction)
        size = hbm_bytes(module, visit.computation, visit.instruction)
        busy = (found.flops + found.kernel / KERNEL_EFFICIENCY) / chip.flops
        flops += visit.times * (found.flops + found.kernel)
        kernels += visit.times * found.kernel
        moved += visit.times * size
        seconds += visit.times * max(busy, size / chip.bandwidth)
    return Work(flops, kernels, moved, seconds)


def estimate(done: Work, transfers: list[Collective], chip: Chip) -> Estimate:
    """Returns the time of a step.

    Args:
        done: what a device computes.
        transfers: its collectives.
        chip: its figures.
    """
    across = [c for c in transfers if c.kind.startswith(CROSS_SLICE)]
    inside = [c for c in transfers if not c.kind.startswith(CROSS_SLICE)]
    blocking = sum(c.times * c.seconds for c in inside if not c.overlapped)
    overlapped = sum(c.times * c.seconds for c in inside if c.overlapped)
    network = sum(c.times * c.seconds for c in across)
    compute = (done.flops - done.kernel_flops) / chip.flops
    compute += done.kernel_flops / KERNEL_EFFICIENCY / chip.flops
    memory = done.hbm_bytes / chip.bandwidth
    operations = max(done.seconds, memory)
    limits = {"compute": compute, "HBM": memory, "ICI": blocking + overlapped, "DCN": network}
    return Estimate(
        compute=compute,
        memory=memory,
        operations=operations,
        blocking=blocking,
        overlapped=overlapped,
        network=network,
        lower=max(operations, blocking + overlapped, network),
        estimate=max(operations, overlapped, network) + blocking,
        upper=operations + blocking + overlapped + network,
        bound=max(limits, key=lambda name: limits[name]),
    )
