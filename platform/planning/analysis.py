"""The report on a compiled step: memory, collectives, FLOPs, a roofline and warnings."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from lamina.platform.planning.compiling import Outcome, demand
from lamina.platform.planning.facts import Facts
from lamina.sharding.pods import buffers, collectives, hlo, loops, roofline, warnings
from lamina.sharding.pods.buffers import Memory
from lamina.sharding.pods.collectives import CROSS_SLICE, Collective
from lamina.sharding.pods.roofline import Estimate, Work
from lamina.sharding.pods.topologies import Topology


class Analysis(NamedTuple):
    """A step on a topology.

    Attributes:
        topology: for which it was compiled.
        facts: of the experiment.
        memory: that a device needs; None if the compiler refused the program.
        needed: bytes of HBM.
        usable: bytes of HBM that there are.
        work: of a device; None if the program was refused.
        estimate: of its time; likewise.
        transfers: the collectives.
        warnings: in words.
        refused: the compiler's message.
        seconds: that the compilation took.
    """

    topology: Topology
    facts: Facts
    memory: Memory | None
    needed: float
    usable: float
    work: Work | None
    estimate: Estimate | None
    transfers: tuple[Collective, ...]
    warnings: tuple[str, ...]
    refused: str
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the program fits a device."""
        return not self.refused and self.needed <= self.usable

    def mfu(self, seconds: float) -> float:
        """Returns the share of the pod's peak that the model takes, in a step of `seconds`."""
        layout = self.facts.layout
        return self.facts.model_flops / (layout.devices * layout.chip.flops * seconds)


def analyse(outcome: Outcome, wanted: Topology) -> Analysis:
    """Reads what the compiler has written.

    Raises:
        RuntimeError: the compiler refused the program for another reason than its size.
    """
    facts, chip = outcome.facts, outcome.facts.layout.chip
    if outcome.refused:
        sizes = demand(outcome.refused)
        if sizes is None:
            raise RuntimeError(f"the TPU compiler fails on this program: {outcome.refused}")
        needed, usable = sizes
        if "temporaries" in outcome.refused:
            needed += facts.batch_bytes + sum(leaf.bytes for leaf in facts.leaves)
        told = (*_of_layout(facts), *warnings.memory(needed, chip._replace(usable=usable)))
        return Analysis(
            wanted, facts, None, needed, usable, None, None, (), told, outcome.refused,
            outcome.seconds,
        )  # fmt: skip
    module = hlo.parse(outcome.program)
    schedule = loops.schedule(module)
    memory = buffers.memory(outcome.assignment, module)
    if outcome.memory is not None:
        memory = outcome.memory._replace(activations=memory.activations)
    found = collectives.collectives(module, schedule, facts.layout)
    done = roofline.work(module, schedule, chip)
    told = (
        *warnings.memory(memory.total, chip),
        *_of_layout(facts),
        *warnings.plain_attention(schedule, facts.sequence, done.kernel_flops > 0),
        *warnings.gathered_in_loops(module, schedule, found),
        *warnings.reduced_then_sliced(module, schedule),
        *warnings.crossing_slices(found, facts.layout.shape, facts.layout.slice_axes()),
        *warnings.narrow_gathers(module),
        *warnings.unread(module, schedule),
    )
    return Analysis(
        topology=wanted,
        facts=facts,
        memory=memory,
        needed=memory.total,
        usable=chip.usable,
        work=done,
        estimate=roofline.estimate(done, found, chip),
        transfers=tuple(found),
        warnings=told,
        refused="",
        seconds=outcome.seconds,
    )


def _of_layout(facts: Facts) -> Iterable[str]:
    return warnings.thin_shards(
        (leaf.path.partition("/")[2], leaf.shape, leaf.gathered)
        for leaf in facts.leaves
        if leaf.part == "parameters"
    )


class Traffic(NamedTuple):
    """Collectives of one kind over the same mesh axes.

    Attributes:
        kind: as `Collective.kind`.
        axes: mesh axes.
        group: devices that take part.
        overlapped: whether computation goes on meanwhile.
        times: how many run in a step.
        bytes: of all of them on a device, as `Collective.bytes`.
        seconds: of all of them.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    overlapped: bool
    times: int
    bytes: float
    seconds: float


def traffic(transfers: Iterable[Collective]) -> list[Traffic]:
    """Returns the collectives in groups, those that take longest first; cross-slice ones last."""
    groups: dict[tuple[str, tuple[str, ...], int, bool], list[Collective]] = {}
    for c in transfers:
        groups.setdefault((c.kind, c.axes, c.group, c.overlapped), []).append(c)
    rows = [
        Traffic(
            *key,
            times=sum(c.times for c in members),
            bytes=sum(c.times * c.bytes for c in members),
            seconds=sum(c.times * c.seconds for c in members),
        )
        for key, members in groups.items()
    ]
    return sorted(rows, key=lambda row: (row.kind.startswith(CROSS_SLICE), -row.seconds))


def to_json(analysis: Analysis) -> dict[str, Any]:
    """Returns the report as plain data; bytes, FLOPs and seconds are of one device and one step."""
    facts, estimate, work = analysis.facts, analysis.estimate, analysis.work
    layout, memory = facts.layout, analysis.memory
    report: dict[str, Any] = {
        "topology": analysis.topology.name,
        "slices": analysis.topology.slices,
        "devices": layout.devices,
        "mesh": layout.shape,
        "chip": {
            "kind": layout.chip.kind,
            "flops": layout.chip.flops,
            "hbm_bandwidth": layout.chip.bandwidth,
            "link_bandwidth": layout.chip.link,
            "network_bandwidth": layout.chip.network,
            "source": layout.chip.source,
        },
        "fits": analysis.fits,
        "hbm": {"needed": analysis.needed, "usable": analysis.usable},
        "bytes": {
            "parameters": facts.bytes_of("parameters"),
            "optimizer_state": facts.bytes_of("moments"),
            "other_state": facts.bytes_of("rest"),
            "batch": facts.batch_bytes,
        },
        "largest_shards": [
            {"part": leaf.part, "path": leaf.path, "shape": leaf.shape, "shard": leaf.shard}
            for leaf in sorted(facts.leaves, key=lambda leaf: -leaf.bytes)[:20]
        ],
        "parameters": facts.parameters,
        "examples_per_step": facts.examples,
        "tokens_per_step": facts.tokens,
        "model_flops_per_step": facts.model_flops,
        "warnings": list(analysis.warnings),
        "refused": analysis.refused,
        "compile_seconds": analysis.seconds,
    }
    if memory is None or estimate is None or work is None:
        return report
    report["bytes"] |= {
        "arguments": memory.arguments,
        "outputs": memory.outputs,
        "activations": memory.activations,
        "temporaries": memory.temporary - memory.activations,
        "code": memory.code,
        "total": memory.total,
    }
    rows = traffic(analysis.transfers)
    report["flops"] = work.flops
    report["kernel_flops"] = work.kernel_flops
    report["hbm_traffic"] = work.hbm_bytes
    report["collectives"] = [row._asdict() for row in rows if not row.kind.startswith(CROSS_SLICE)]
    report["cross_slice"] = [row._asdict() for row in rows if row.kind.startswith(CROSS_SLICE)]
    report["seconds"] = estimate._asdict()
    report["mfu"] = {
        "lower": analysis.mfu(estimate.upper),
        "estimate": analysis.mfu(estimate.estimate),
        "upper": analysis.mfu(estimate.lower),
    }
    return report
