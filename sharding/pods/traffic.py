"""Bytes that a scheduled instruction moves between HBM and the chip, read from its operands.

A fusion's operand of which only slices are taken counts as the slices, and a result that is an old
array with a part replaced counts as the part: stacked parameters and saved activations of a scan
would else be counted whole in every step. What lies in VMEM (``S(1)``) takes no part.
"""

from lamina.sharding.pods.hlo import HBM, Computation, Instruction, Module

FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
        *("partition-id", "replica-id", "while", "conditional", "call", "opt-barrier"),
        *("copy-done", "slice-done", "async-done", "async-update", "all-gather-done"),
        *("all-reduce-done", "collective-permute-done", "send-done", "recv-done"),
    }
)
"""Opcodes that move nothing themselves."""
SLICES = ("dynamic-slice", "slice", "gather")


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes that one run of an instruction reads from and writes to HBM."""
    opcode = instruction.opcode
    if opcode in FREE or '"AllocateBuffer"' in instruction.text:
        return 0.0
    operands = [computation.instructions[name] for name in instruction.operands]
    if opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        if any('"AsyncCollectiveDone"' in each.text for each in inner.instructions.values()):
            return 0.0  # waits for what its start has counted
        return _fusion_reads(module, inner, operands) + _fusion_writes(module, inner, instruction)
    if opcode in SLICES:
        return 2.0 * _written(instruction)
    if opcode == "dynamic-update-slice":
        return 2.0 * _written(operands[1])
    if opcode in ("copy-start", "slice-start", "collective-permute-start"):
        # (destination, source, context): the source is the operand.
        first = instruction.shapes[0]
        return (first.bytes if first.space == HBM else 0.0) + sum(map(_written, operands))
    return _written(instruction) + sum(map(_written, operands))


def _written(instruction: Instruction) -> float:
    return sum(shape.bytes for shape in instruction.shapes if shape.space == HBM)


def _fusion_reads(module: Module, inner: Computation, operands: list[Instruction]) -> float:
    total = 0.0
    parameters = inner.parameters
    for number, operand in enumerate(operands):
        whole = _written(operand)
        if not whole or number not in parameters:
            continue
        total += min(whole, touched(module, inner, parameters[number].name, whole))
    return total


def touched(module: Module, inner: Computation, name: str, whole: float) -> float:
    """Returns how many bytes of the array `name` a fused computation reads."""
    total = 0.0
    for user in inner.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode in SLICES and user.operands[0] == name:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif user.opcode == "bitcast":
            total += touched(module, inner, user.name, whole)
        elif user.opcode == "fusion":
            nested = module.computations[user.called("calls")[0]]
            parameters = nested.parameters
            total += sum(
                touched(module, nested, parameters[number].name, whole)
                for number, operand in enumerate(user.operands)
                if operand == name and number in parameters
            )
        else:
            return whole
    return min(total, whole)


def _fusion_writes(module: Module, inner: Computation, fusion: Instruction) -> float:
    root = inner.instructions[inner.root]
    roots = [inner.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(fusion.shapes):
        return _written(fusion)
    return sum(
        min(shape.bytes, _replaced(module, inner, each))
        for shape, each in zip(fusion.shapes, roots, strict=True)
        if shape.space == HBM
    )


def _replaced(module: Module, inner: Computation, root: Instruction) -> float:
    """Returns the bytes that a result writes: of an updated array those of the update."""
    if root.opcode == "bitcast":
        return _replaced(module, inner, inner.instructions[root.operands[0]])
    if root.opcode == "dynamic-update-slice":
        return sum(shape.bytes for shape in inner.instructions[root.operands[1]].shapes)
    if root.opcode == "fusion" and len(root.shapes) == 1:
        nested = module.computations[root.called("calls")[0]]
        return _replaced(module, nested, nested.instructions[nested.root])
    return sum(shape.bytes for shape in root.shapes)
