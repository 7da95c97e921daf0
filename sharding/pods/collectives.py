"""The collectives of a scheduled program: kind, mesh axes, count, bytes, and the time of each.

Three things differ on TPU from what a reader of HLO expects. One asynchronous collective is written
many times, once in each fusion that computes while it runs, with one `channel_id`: it counts where
it starts. A fusion named `all-reduce-scatter` is a reduce-scatter. Traffic between slices is no
collective at all but a `send` to the host, whose attributes say that Megascale shall reduce it.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lamina.sharding.pods.hlo import Computation, Instruction, Module
from lamina.sharding.pods.loops import Schedule, Visit
from lamina.sharding.pods.torus import Layout, transfer_seconds

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
CROSS_SLICE = "cross-slice"
"""Word before the kind of a transfer between slices, such as "cross-slice all-reduce"."""


class Collective(NamedTuple):
    """One collective of the schedule.

    Attributes:
        kind: one of `KINDS`, or such a kind behind `CROSS_SLICE`.
        axes: mesh axes along which the devices of a group differ.
        group: devices in a group.
        times: how often it runs in a step.
        depth: number of loops around it.
        bytes: of the whole array on one device, for one run: what a gather returns, what a
            reduction, a scatter or an exchange takes.
        dtypes: of its arrays.
        overlapped: whether the program computes while it runs.
        seconds: that one run takes on the torus's links.
        scope: where it comes from in the traced program.
        name: of the instruction.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    times: int
    depth: int
    bytes: float
    dtypes: tuple[str, ...]
    overlapped: bool
    seconds: float
    scope: str
    name: str


def collectives(module: Module, schedule: Schedule, layout: Layout) -> list[Collective]:
    """Returns the collectives of a program in the order of its schedule.

    Args:
        module: the program.
        schedule: of it.
        layout: where the mesh's devices stand.
    """
    started = _started(module)
    found = []
    for visit in schedule.visits:
        instruction = visit.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            overlapped = instruction.opcode.endswith("-start")
            found.append(
                _collective(visit, visit.computation, instruction, kind, overlapped, layout)
            )
        elif instruction.opcode == "fusion":
            found += _fused(module, visit, started, layout)
        elif instruction.opcode == "send" and "megascale" in instruction.text:
            found.append(_cross_slice(visit, layout))
    return found


def _started(module: Module) -> set[str]:
    """Returns the channels of the collectives that have a place where they start."""
    return {
        inner.attribute("channel_id")
        for computation in module.computations.values()
        for inner in computation.instructions.values()
        if inner.opcode in KINDS and _starts(computation, inner)
    }


def _starts(computation: Computation, collective: Instruction) -> bool:
    return any(
        '"AsyncCollectiveStart"' in user.text
        for user in computation.instructions.values()
        if user.opcode == "custom-call" and collective.name in user.operands
    )


def _fused(module: Module, visit: Visit, started: set[str], layout: Layout) -> list[Collective]:
    found = []
    for name in visit.instruction.called("calls"):
        inner = module.computations[name]
        for instruction in inner.instructions.values():
            if instruction.opcode not in KINDS:
                continue
            asynchronous = instruction.attribute("channel_id") in started
            if asynchronous and not _starts(inner, instruction):
                continue  # one of the pieces of a collective that started elsewhere
            kind = instruction.opcode
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            found.append(_collective(visit, inner, instruction, kind, asynchronous, layout))
    return found


def _collective(
    visit: Visit,
    computation: Computation,
    instruction: Instruction,
    kind: str,
    overlapped: bool,
    layout: Layout,
) -> Collective:
    members = groups(instruction, layout.devices)
    operands = [s for n in instruction.operands for s in computation.instructions[n].shapes]
    size = sum(shape.bytes for shape in operands)
    if kind == "collective-permute":
        pairs = np.asarray(members)
        axes, group = layout.differing(pairs), len(pairs)
        seconds = transfer_seconds(kind, size, pairs, layout)
    else:
        axes, group = layout.differing(np.asarray(members[:1])), len(members[0])
        size *= group if kind == "all-gather" else 1
        seconds = transfer_seconds(kind, size, np.asarray(members[:1]), layout)
    return Collective(
        kind=kind,
        axes=axes,
        group=group,
        times=visit.times,
        depth=visit.depth,
        bytes=size,
        dtypes=tuple(sorted({shape.dtype for shape in operands})),
        overlapped=overlapped,
        seconds=seconds,
        scope=instruction.scope or visit.instruction.scope,
        name=instruction.name,
    )


def _cross_slice(visit: Visit, layout: Layout) -> Collective:
    instruction = visit.instruction
    found = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', instruction.text)
    kind = found.group(1).lower().replace("_", "-") if found else "transfer"
    size = instruction.shapes[0].bytes
    return Collective(
        kind=f"{CROSS_SLICE} {kind}",
        axes=layout.slice_axes(),
        group=layout.slices,
        times=visit.times,
        depth=visit.depth,
        bytes=size,
        dtypes=(instruction.shapes[0].dtype,),
        overlapped=True,
        seconds=size / layout.chip.network,
        scope=instruction.scope,
        name=instruction.name,
    )


def groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Returns the groups of a collective, or the (source, target) pairs of a permutation.

    Understands lists ``{{0,1},{2,3}}``, iotas ``[2,4]<=[4,2]T(1,0)`` and meshes
    ``mesh['a'=4,'b'=2] {'a'}``, whose axes may be parts of axes ``'a':(2)2``.

    Args:
        instruction: the collective.
        devices: how many there are.
    """
    if instruction.opcode.startswith("collective-permute"):
        text = instruction.attribute("source_target_pairs")
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", text)]
    text = instruction.attribute("replica_groups")
    if text.startswith("mesh"):
        return _mesh_groups(text, devices)
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, source, order = (
            [int(n) for n in part.split(",")] if part else [] for part in iota.groups()
        )
        ids = np.arange(math.prod(source)).reshape(source)
        return ids.transpose(order or range(ids.ndim)).reshape(shape).tolist()
    lists = [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", text)]
    return lists or [list(range(devices))]


def _mesh_groups(text: str, devices: int) -> list[list[int]]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text)}
    chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.index("]") + 1 :])
    given = re.search(r"device_ids=\(([\d,]+)\)", text)
    ids = np.asarray([int(n) for n in given.group(1).split(",")]) if given else np.arange(devices)
    # Each axis is cut into (before, chosen, after), of which the chosen part stays in the group.
    shape, inside, outside = [], [], []
    parts: Mapping[str, tuple[str, str]] = {name: (pre, size) for name, pre, size in chosen}
    for name, size in sizes.items():
        before, length = (int(n or 1) for n in parts.get(name, ("", "")))
        length = size if name in parts and not parts[name][1] else length
        start = len(shape)
        shape += [before, length, size // (before * length)]
        outside += [start, start + 2] if name in parts else [start, start + 1, start + 2]
        inside += [start + 1] if name in parts else []
    group = math.prod(shape[i] for i in inside)
    return ids.reshape(shape).transpose(outside + inside).reshape(-1, group).tolist()
