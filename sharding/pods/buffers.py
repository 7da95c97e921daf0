"""What a program keeps in HBM, from the compiler's buffer assignment.

The assignment lists every allocation and the values that lie in it. It is there seconds after the
compiler has begun, long before `memory_analysis` can be asked for.
"""

import re
from typing import NamedTuple

from lamina.sharding.pods.hlo import Module

_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+), (.*):\s*$", re.MULTILINE)
_VALUE = re.compile(
    r"^ value: <\d+ ([\w.\-]+)(?:\{[\d,]*\})? @\d+> \(size=(\d+),offset=(\d+)\)", re.MULTILINE
)


class Memory(NamedTuple):
    """Bytes of HBM on one device.

    Attributes:
        arguments: of the program.
        outputs: that don't take the place of an argument.
        temporary: all else; the largest heap of the run.
        activations: the part of `temporary` that the forward pass leaves for the backward pass.
        code: of the program, where it is known (a whole compilation tells).
    """

    arguments: int
    outputs: int
    temporary: int
    activations: int
    code: int = 0

    @property
    def total(self) -> int:
        """What a program needs."""
        return self.arguments + self.outputs + self.temporary + self.code


def memory(assignment: str, module: Module) -> Memory:
    """Reads a buffer assignment.

    Args:
        assignment: text of the compiler's file ``*-buffer-assignment.txt``.
        module: the program, to see which values are activations.

    Raises:
        ValueError: the text has no allocations.
    """
    arguments = outputs = temporary = activations = 0
    parts = _ALLOCATION.split(assignment)
    if len(parts) < 4:
        raise ValueError("this is no buffer assignment: it has no allocations")
    kept = _kept_for_backward(module)
    for size, about, values in zip(parts[2::4], parts[3::4], parts[4::4], strict=True):
        if "color" in about:  # VMEM and other small memories
            continue
        if "parameter" in about:
            arguments += int(size)
        elif "maybe-live-out" in about:
            outputs += int(size)
        elif "preallocated-temp" in about:
            temporary += int(size)
            activations += _covered(
                (int(offset), int(length))
                for name, length, offset in _VALUE.findall(values)
                if name in kept
            )
    return Memory(arguments, outputs, temporary, activations)


def _covered(ranges) -> int:
    """Returns the length of the union of (start, length) ranges."""
    total = end = 0
    for start, length in sorted(ranges):
        total += max(0, start + length - max(start, end))
        end = max(end, start + length)
    return total


def _kept_for_backward(module: Module) -> set[str]:
    """Returns the values that the forward pass computes and the backward pass reads.

    Where an operation comes from is in its scope: ``jvp`` marks the forward pass of a gradient,
    ``transpose`` the backward pass. Tuples and loops are looked through.
    """
    kept: set[str] = set()
    for computation in module.computations.values():
        instructions = computation.instructions
        backward = {name for name, i in instructions.items() if "transpose(" in i.scope}
        for instruction in reversed(instructions.values()):
            if instruction.opcode in ("tuple", "get-tuple-element", "bitcast", "copy-done"):
                continue
            if instruction.name not in backward:
                continue
            for operand in _sources(instructions, instruction.operands):
                if operand not in backward and "jvp(" in instructions[operand].scope:
                    kept |= _same_buffer(instructions, operand)
    return kept


def _sources(instructions, names) -> set[str]:
    found, waiting = set(), list(names)
    while waiting:
        instruction = instructions[waiting.pop()]
        if instruction.opcode in ("tuple", "get-tuple-element", "bitcast", "copy-done"):
            waiting += instruction.operands
        else:
            found.add(instruction.name)
    return found


def _same_buffer(instructions, name: str) -> set[str]:
    """Returns the value and, of a loop's result, the arrays with which the loop began."""
    instruction = instructions[name]
    first = instruction.operands if instruction.opcode == "while" else ()
    return {name} | _sources(instructions, first)
