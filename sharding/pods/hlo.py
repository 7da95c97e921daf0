"""Parser of XLA's scheduled HLO text: computations, instructions, shapes, and nothing else.

The text is what ``compiled.as_text()`` returns and what ``--xla_dump_hlo_as_text`` writes. Only its
syntax is known here; what an instruction costs is the business of the modules beside this one.
"""

import math
import re
from typing import NamedTuple

BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "f8e4m3b11fnuz": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
}
"""Bytes of one element; what isn't here (tokens) takes none."""

HBM = 0
"""Memory space of a buffer without ``S(n)`` in its layout; on TPU 1 is VMEM, 5 the host."""


class Shape(NamedTuple):
    """An array's type.

    Attributes:
        dtype: as XLA writes it, such as "bf16".
        dims: extents.
        space: memory space, `HBM` or the n of ``S(n)``.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Size without the padding of its tiles."""
        return self.elements * BYTES.get(self.dtype, 0)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: unique in its computation.
        opcode: such as "fusion".
        shapes: of its arrays; a tuple (also a nested one) has several.
        operands: names of instructions of the same computation.
        text: all that stands behind the operands, and for a constant the literal.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str

    def attribute(self, name: str) -> str:
        """Returns an attribute's text up to the next comma at its level; "" if it has none."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.text)
        return _until_comma(self.text, found.end()) if found else ""

    def called(self, name: str) -> tuple[str, ...]:
        """Returns the computations that an attribute names."""
        return tuple(re.findall(r"%([\w.\-]+)", self.attribute(name)))

    @property
    def scope(self) -> str:
        """Where it comes from in the traced program, as ``jit(f)/while/body/dot_general``."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.text)
        return found.group(1) if found else ""


class Computation(NamedTuple):
    """A function of the module.

    Attributes:
        name: without the percent sign.
        instructions: by name, in the order of the schedule.
        root: name of the result.
    """

    name: str
    instructions: dict[str, Instruction]
    root: str

    @property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {
            int(i.text.partition(")")[0]): i
            for i in self.instructions.values()
            if i.opcode == "parameter"
        }


class Module(NamedTuple):
    """A parsed program.

    Attributes:
        computations: by name.
        entry: name of the computation that runs.
        header: the first line.
    """

    computations: dict[str, Computation]
    entry: str
    header: str


_COMMENT = re.compile(r"/\*[^*]*\*/")
_BEGIN = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$", re.DOTALL)
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")


def parse(text: str) -> Module:
    """Parses a module.

    Raises:
        ValueError: the text is no HLO module with an entry.
    """
    lines = text.splitlines()
    if not lines or not lines[0].startswith("HloModule"):
        raise ValueError("this is no HLO text: it doesn't begin with HloModule")
    computations: dict[str, Computation] = {}
    entry, name, pending, body = "", "", "", []
    for line in lines[1:]:
        if not name:
            found = _BEGIN.match(line)
            if found:
                name, body, pending = found.group(2), [], ""
                entry = name if found.group(1) else entry
        elif line == "}" or line.startswith("}, "):
            body.append(pending)
            computations[name] = _computation(name, body)
            name = ""
        elif _INSTRUCTION.match(line):
            body.append(pending)
            pending = line
        else:  # a kernel's text goes on over several lines, some of which begin with braces
            pending += "\n" + line
    if entry not in computations:
        raise ValueError("this HLO text has no whole ENTRY computation")
    return Module(computations, entry, lines[0])


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, ""
    for line in lines:
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        instruction = _instruction(found.group(2), found.group(3))
        instructions[instruction.name] = instruction
        root = instruction.name if found.group(1) or not root else root
    return Computation(name, instructions, root)


def _instruction(name: str, text: str) -> Instruction:
    head, tail = text[:200_000], text[200_000:]
    text = _COMMENT.sub("", head) + tail
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes = parse_shapes(text[:end])
    found = _OPCODE.match(text, end)
    if not found:
        raise ValueError(f"HLO instruction {name!r} has no opcode: {text[:80]!r}")
    opcode, start = found.group(1), found.end()
    close = _closing(text, start - 1)
    inside = text[start:close]
    if opcode in ("constant", "parameter"):
        return Instruction(name, opcode, shapes, (), inside + ")" + text[close + 1 :])
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode, shapes, operands, text[close + 1 :].lstrip(", "))


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Returns the arrays of a type, such as ``(f32[2,3]{1,0:T(8,128)S(1)}, s32[])``."""
    shapes = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        extents = tuple(int(d.replace("<=", "")) for d in dims.split(",") if d)
        shapes.append(Shape(dtype, extents, int(space.group(1)) if space else HBM))
    return tuple(shapes)


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.finditer(r'[()]|"(?:[^"\\]|\\.)*"', text[start:]):
        depth += {"(": 1, ")": -1}.get(found.group(), 0)
        if depth == 0:
            return start + found.start()
    raise ValueError(f"unbalanced parentheses in HLO text: {text[start : start + 80]!r}")


def _until_comma(text: str, start: int) -> str:
    depth = 0
    for found in re.finditer(r'[(\[{]|[)\]}]|,|"(?:[^"\\]|\\.)*"', text[start:]):
        mark = found.group()
        if mark == "," and depth == 0:
            return text[start : start + found.start()]
        depth += 1 if mark in "([{" else -1 if mark in ")]}" else 0
        if depth < 0:
            return text[start : start + found.start()]
    return text[start:].strip()
