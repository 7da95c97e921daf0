"""Which instructions a scheduled program runs, and how often: trip counts and the walk over them.

XLA writes `known_trip_count` on CPU and GPU only. On TPU the limit is read from the loop's
condition, the start from the initial tuple, and the step from the body: a loop that multiplies
matrices while it gathers one of them (a "collective matmul") takes two steps at once.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from lamina.sharding.pods.hlo import Computation, Instruction, Module

CALLS = {
    "call": ("to_apply",),
    "async-start": ("calls",),
    "conditional": ("true_computation", "false_computation", "branch_computations"),
}
"""Opcodes whose computations run as they stand, and the attributes that name these."""


class Visit(NamedTuple):
    """An instruction of the schedule.

    Attributes:
        instruction: itself.
        computation: whose schedule it stands in.
        times: how often it runs in one call of the program.
        depth: number of loops around it.
    """

    instruction: Instruction
    computation: Computation
    times: int
    depth: int


class Frame(NamedTuple):
    """A computation as it is called, so that its parameters have values.

    Attributes:
        computation: the callee.
        arguments: names of the caller's instructions, one for each parameter.
        caller: None for the entry.
    """

    computation: Computation
    arguments: tuple[str, ...] = ()
    caller: "Frame | None" = None


class Schedule(NamedTuple):
    """What a program runs.

    Attributes:
        visits: every instruction of the entry and of the loops' bodies, in order. What stands
            inside a fusion isn't there: it is a part of the fusion.
        unknown: names of the loops whose trip count couldn't be read; they are counted once.
    """

    visits: tuple[Visit, ...]
    unknown: tuple[str, ...]


def schedule(module: Module) -> Schedule:
    """Walks a module from its entry.

    Of a conditional the branch with the most instructions is taken.
    """
    unknown: list[str] = []
    entry = Frame(module.computations[module.entry])
    return Schedule(tuple(_walk(module, entry, 1, 0, unknown)), tuple(unknown))


def _walk(
    module: Module, frame: Frame, times: int, depth: int, unknown: list[str]
) -> Iterator[Visit]:
    for instruction in frame.computation.instructions.values():
        yield Visit(instruction, frame.computation, times, depth)
        if instruction.opcode == "while":
            trips = trip_count(module, frame, instruction)
            if trips is None:
                unknown.append(instruction.name)
            body = module.computations[instruction.called("body")[0]]
            inner = Frame(body, instruction.operands, frame)
            yield from _walk(
                module, inner, times * (1 if trips is None else trips), depth + 1, unknown
            )
        elif instruction.opcode in CALLS:
            names = [n for key in CALLS[instruction.opcode] for n in instruction.called(key)]
            called = [module.computations[name] for name in names if name in module.computations]
            if not called:
                continue
            if instruction.opcode == "conditional":
                largest = max(called, key=lambda c: len(c.instructions))
                operand = instruction.operands[1 + called.index(largest) :][:1]
                inner = Frame(largest, operand, frame)
            else:
                inner = Frame(called[0], instruction.operands, frame)
            yield from _walk(module, inner, times, depth, unknown)


def trip_count(module: Module, frame: Frame, loop: Instruction) -> int | None:
    """Returns how often a loop's body runs; None if that can't be read.

    Args:
        module: the program.
        frame: in which the loop stands.
        loop: a ``while`` instruction.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.called("condition")[0]]
    inside = Frame(condition, loop.operands, frame)
    found = _comparison(module, inside, condition.instructions[condition.root])
    if found is None:
        return None
    frame_of_test, left, right, direction = found
    index = _carried(frame_of_test, left)
    if index is None:
        left, right = right, left
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
        index = _carried(frame_of_test, left)
    limit = constant(module, frame_of_test, right)
    start = _element(module, frame, loop.operands[0], index) if index is not None else None
    body = module.computations[loop.called("body")[0]]
    step = _step(module, body, index) if index is not None else None
    if limit is None or start is None or not step:
        return None
    span = limit - start + {"LE": 1, "GE": -1}.get(direction, 0)
    return max(0, -(-span // step)) if direction != "EQ" else None


def _comparison(
    module: Module, frame: Frame, instruction: Instruction
) -> tuple[Frame, str, str, str] | None:
    """Returns (frame, left, right, direction) of the comparison that ends a condition."""
    if instruction.opcode == "compare":
        left, right = instruction.operands
        return frame, left, right, instruction.attribute("direction")
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        return _comparison(
            module, Frame(inner, instruction.operands, frame), inner.instructions[inner.root]
        )
    return None


def _carried(frame: Frame, name: str) -> int | None:
    """Returns which element of the loop's tuple an instruction of its condition is."""
    instruction = frame.computation.instructions[name]
    if instruction.opcode == "get-tuple-element":
        source = frame.computation.instructions[instruction.operands[0]]
        return int(instruction.attribute("index")) if source.opcode == "parameter" else None
    if instruction.opcode in ("copy", "convert", "bitcast"):
        return _carried(frame, instruction.operands[0])
    if instruction.opcode == "parameter" and frame.caller is not None and _fused(frame):
        return _carried(frame.caller, frame.arguments[_number(instruction)])
    return None


def _fused(frame: Frame) -> bool:
    """Whether the parameters of a frame are arrays of the caller (and not a loop's tuple)."""
    return len(frame.arguments) == len(frame.computation.parameters) and not any(
        len(p.shapes) > 1 for p in frame.computation.parameters.values()
    )


def _number(parameter: Instruction) -> int:
    return int(parameter.text.partition(")")[0])


def constant(module: Module, frame: Frame, name: str) -> int | None:
    """Returns the value of an integer scalar, where it follows from constants; else None."""
    instruction = frame.computation.instructions[name]
    if instruction.opcode == "constant":
        found = re.match(r"-?\d+(?=\))", instruction.text)
        return int(found.group()) if found else None
    if instruction.opcode in ("copy", "convert", "bitcast", "reshape"):
        return constant(module, frame, instruction.operands[0])
    if instruction.opcode in ("add", "subtract", "multiply"):
        left, right = (constant(module, frame, operand) for operand in instruction.operands)
        if left is None or right is None:
            return None
        return {"add": left + right, "subtract": left - right, "multiply": left * right}[
            instruction.opcode
        ]
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        return constant(module, Frame(inner, instruction.operands, frame), inner.root)
    if instruction.opcode == "parameter" and frame.caller is not None and frame.arguments:
        return constant(module, frame.caller, frame.arguments[_number(instruction)])
    if instruction.opcode == "get-tuple-element":
        return _element(module, frame, instruction.operands[0], int(instruction.attribute("index")))
    return None


def _element(module: Module, frame: Frame, name: str, index: int) -> int | None:
    """Returns element `index` of a tuple: that of a loop at its start, or its invariant value."""
    instruction = frame.computation.instructions[name]
    if instruction.opcode == "tuple":
        return constant(module, frame, instruction.operands[index])
    if instruction.opcode in ("while", "copy"):
        return _element(module, frame, instruction.operands[0], index)
    if instruction.opcode == "parameter" and frame.caller is not None and frame.arguments:
        return _element(module, frame.caller, frame.arguments[_number(instruction)], index)
    return None


def _step(module: Module, body: Computation, index: int) -> int | None:
    """Returns what a loop's body adds to element `index` of its tuple."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return None
    return _added(module, Frame(body), root.operands[index], index)


def _added(module: Module, frame: Frame, name: str, index: int) -> int | None:
    instruction = frame.computation.instructions[name]
    if instruction.opcode in ("copy", "bitcast", "convert"):
        return _added(module, frame, instruction.operands[0], index)
    if instruction.opcode == "get-tuple-element":
        source = frame.computation.instructions[instruction.operands[0]]
        if source.opcode == "fusion":  # one of the results of a fusion
            inner = module.computations[source.called("calls")[0]]
            results = inner.instructions[inner.root].operands
            which = results[int(instruction.attribute("index"))]
            return _added(module, Frame(inner, source.operands, frame), which, index)
        carried = source.opcode == "parameter" and int(instruction.attribute("index")) == index
        return 0 if carried else None
    if instruction.opcode == "parameter" and frame.caller is not None:
        return _added(module, frame.caller, frame.arguments[_number(instruction)], index)
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        return _added(module, Frame(inner, instruction.operands, frame), inner.root, index)
    if instruction.opcode in ("add", "subtract"):
        sign = 1 if instruction.opcode == "add" else -1
        left, right = instruction.operands
        for one, other, factor in ((left, right, sign), (right, left, 1)):
            before, more = _added(module, frame, one, index), constant(module, frame, other)
            if before is not None and more is not None:
                return before + factor * more
    return None
