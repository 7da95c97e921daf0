"""What in a compiled step or its layout is known to cost time or memory on TPU, said in words.

Each function returns the warnings of one kind, a sentence or two each, that name the figures and
what to try.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from lamina.sharding.pods.chips import GIB, Chip
from lamina.sharding.pods.collectives import CROSS_SLICE, Collective
from lamina.sharding.pods.hlo import HBM, Computation, Instruction, Module
from lamina.sharding.pods.loops import Schedule, Visit
from lamina.sharding.pods.products import products
from lamina.sharding.pods.traffic import SLICES, touched

ROWS = 16
"""Rows of a tile of bfloat16: thinner shards are padded, and gathered by reductions."""
LANES = 128
"""Columns of a tile: a narrower array is padded to them."""
LARGE = 2**20
"""Bytes below which a transfer isn't worth a warning."""
LONG = 2048
"""Tokens from which on the logits of plain attention cost more than its products."""


def thin_shards(
    parameters: Iterable[tuple[str, Sequence[int], Sequence[int]]],
) -> Iterator[str]:
    """Warns of parameters that are split into pieces of fewer than `ROWS` rows.

    Args:
        parameters: (path, shape, shape of one device's part) of each.
    """
    thin = [
        (path, extent)
        for path, shape, shard in parameters
        if len(shape) >= 2
        for whole, extent in zip(shape, shard, strict=True)
        if extent < whole and extent < ROWS
    ]
    if thin:
        path, rows = min(thin, key=lambda each: each[1])
        yield (
            f"thin shards: {len(thin)} parameters are split into fewer than {ROWS} rows (a tile of "
            f"bfloat16), such as {path} into {rows}. They are padded, and their gradients are "
            "reduced whole instead of scattered. Split over fewer devices: a smaller fsdp axis, "
            "with data for the rest"
        )


def gathered_in_loops(
    module: Module, schedule: Schedule, found: Sequence[Collective]
) -> Iterator[str]:
    """Warns of arrays that a loop doesn't change, and gathers in every round all the same."""
    sizes = {c.name: c for c in found if c.kind == "all-gather" and c.depth}
    for visit in schedule.visits:
        for computation, instruction in _collectives_of(module, visit):
            gather = sizes.pop(instruction.name, None)
            if gather is None or gather.bytes < LARGE:
                continue
            outside = visit.instruction if computation is not visit.computation else instruction
            if all(_invariant(visit.computation, name) for name in outside.operands):
                yield (
                    f"gathered again in a loop: {gather.bytes / 1e6:.1f} MB, {gather.times} times "
                    f"a step, though the loop doesn't change it ({_place(gather.scope)}). Gather "
                    "it once before the loop, or make the loop shorter"
                )


def _collectives_of(module: Module, visit: Visit) -> Iterator[tuple[Computation, Instruction]]:
    if visit.instruction.opcode == "fusion":
        for name in visit.instruction.called("calls"):
            inner = module.computations[name]
            yield from ((inner, i) for i in inner.instructions.values() if "all-" in i.opcode)
    elif visit.instruction.opcode.startswith("all-gather"):
        yield visit.computation, visit.instruction


def _invariant(computation: Computation, name: str) -> bool:
    """Whether an array of a loop's body is the same in every round."""
    instruction = computation.instructions[name]
    if instruction.opcode == "constant":
        return True
    if instruction.opcode == "get-tuple-element":
        source = computation.instructions[instruction.operands[0]]
        root = computation.instructions[computation.root]
        if source.opcode != "parameter":
            return _invariant(computation, source.name)
        index = instruction.attribute("index")
        after = computation.instructions.get(
            root.operands[int(index)] if int(index) < len(root.operands) else ""
        )
        return (
            after is not None
            and after.opcode == "get-tuple-element"
            and after.operands == instruction.operands
            and after.attribute("index") == index
        )
    if instruction.opcode in ("bitcast", "convert", "copy", "reshape", "transpose", "fusion"):
        return bool(instruction.operands) and all(
            _invariant(computation, operand) for operand in instruction.operands
        )
    return False


def reduced_then_sliced(module: Module, schedule: Schedule) -> Iterator[str]:
    """Warns of all-reduces of whose result every device keeps a slice only."""
    total, count = 0.0, 0
    for visit in schedule.visits:
        instruction = visit.instruction
        if instruction.opcode != "all-reduce" or len(instruction.shapes) != 1:
            continue
        size = instruction.shapes[0].bytes
        if size >= LARGE and _read(module, visit.computation, instruction.name, size) <= size / 2:
            total += visit.times * size
            count += visit.times
    if count:
        yield (
            f"all-reduce where a reduce-scatter would do: {count} a step, {total / 1e6:.0f} MB, of "
            "whose results each device keeps a slice. They move twice the bytes. Larger shards "
            "(a smaller fsdp axis) let the compiler fuse the slice"
        )


def _read(module: Module, computation: Computation, name: str, whole: float) -> float:
    """Returns how many bytes of an array its computation reads."""
    total = 0.0
    for user in computation.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode in SLICES and user.operands[0] == name:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode in ("bitcast", "copy", "convert", "get-tuple-element"):
            total += _read(module, computation, user.name, whole)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")[0]]
            number = user.operands.index(name)
            parameter = inner.parameters.get(number)
            total += touched(module, inner, parameter.name, whole) if parameter else whole
        else:
            return whole
    return total or whole


def crossing_slices(
    found: Sequence[Collective], shape: Mapping[str, int], slice_axes: Sequence[str]
) -> Iterator[str]:
    """Warns of traffic between slices inside loops, or in a step of islands that have none.

    Args:
        found: the collectives.
        shape: mesh axis to its size.
        slice_axes: mesh axes that go over slices.
    """
    across = [c for c in found if c.kind.startswith(CROSS_SLICE)]
    inside = [c for c in across if c.depth]
    if inside:
        total = sum(c.times * c.bytes for c in inside)
        yield (
            f"traffic between slices inside a loop: {sum(c.times for c in inside)} transfers, "
            f"{total / 1e6:.1f} MB a step. Put only data or replica over the slices (mesh.dcn), "
            "and sum gradients over slices once a step"
        )
    if across and tuple(slice_axes) == ("replica",) and shape.get("replica", 1) > 1:
        total = sum(c.times * c.bytes for c in across)
        yield (
            f"the inner step of islands crosses slices: {sum(c.times for c in across)} transfers, "
            f"{total / 1e6:.1f} MB. Only the outer step should"
        )
    small = [c for c in across if c.bytes < LARGE]
    if sum(c.times for c in small) > 8:
        yield (
            f"{sum(c.times for c in small)} transfers between slices are smaller than 1 MB: each "
            "has its own latency. Fewer and larger parameters (scan = True) would join them"
        )


def plain_attention(schedule: Schedule, sequence: int, kernels: bool) -> Iterator[str]:
    """Warns of attention that writes its logits to HBM.

    Args:
        schedule: of the program.
        sequence: tokens of an example.
        kernels: whether the program has attention kernels.
    """
    if kernels or sequence < LONG:
        return
    largest = max(
        (
            shape.bytes
            for visit in schedule.visits
            for shape in visit.instruction.shapes
            if visit.instruction.opcode in ("fusion", "convolution", "dot")
            and shape.space == HBM
            and sequence in shape.dims
            and sum(extent % sequence == 0 for extent in shape.dims) >= 2
        ),
        default=0.0,
    )
    if largest:
        yield (
            f"plain attention over {sequence} tokens: its logits go through HBM (the largest array "
            f"of squares has {largest / 1e6:.0f} MB). model.attention = 'splash' keeps them on the "
            "chip"
        )


def narrow_gathers(module: Module) -> Iterator[str]:
    """Warns of embedding lookups from tables that are split along their width."""
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode != "gather":
                continue
            table = computation.instructions[instruction.operands[0]].shapes[0].dims
            if len(table) != 2:  # pictures, not a table of vectors
                continue
            dims = instruction.shapes[0].dims
            padded = instruction.shapes[0].bytes * LANES / max(1, dims[-1]) if dims else 0
            if dims and dims[-1] < LANES and padded >= 64 * LARGE:
                yield (
                    f"an embedding is split along its width: looking up {dims} pads {dims[-1]} "
                    f"columns to {LANES}, {padded / 1e6:.0f} MB. Split it along the vocabulary "
                    "(sharding.axes.vocab)"
                )
                return


def memory(total: float, chip: Chip) -> Iterator[str]:
    """Warns of a program that needs more than the usable HBM."""
    if total > chip.usable:
        yield (
            f"doesn't fit: {total / GIB:.2f} GiB of {chip.usable / GIB:.2f} GiB usable HBM. Split "
            "over more devices (fsdp), keep less (model.remat), or compute on less at once "
            "(accumulation)"
        )


def unread(module: Module, schedule: Schedule) -> Iterator[str]:
    """Warns of loops with products whose length can't be read, so that the figures are too low.

    Other loops, such as the drawing of random numbers until one is accepted, cost little.
    """
    bodies = {
        v.instruction.called("body")[0]: v.instruction
        for v in schedule.visits
        if v.instruction.name in schedule.unknown and v.instruction.opcode == "while"
    }
    heavy = {
        v.computation.name
        for v in schedule.visits
        if v.computation.name in bodies and any(products(module, v.computation, v.instruction))
    }
    for name in sorted(heavy):
        loop = bodies[name]
        yield (
            f"the length of the loop {loop.name} ({_place(loop.scope)}) can't be read, so it "
            "counts once: all figures are lower bounds"
        )


def _place(scope: str) -> str:
    return "/".join(scope.split("/")[-2:]) or "of unknown origin"
