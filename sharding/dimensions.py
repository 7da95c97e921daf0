"""Which dimensions of a computation's arrays are one and the same dimension, read from its jaxpr.

Every dimension is a row of atoms, major first: `(heads * units,)` that is reshaped to
`(heads, units)` is known as two atoms from then on. Atoms that an operation ties together (the two
operands of a sum, the contracted dimensions of a product) are united. What an operation that isn't
known here does to dimensions of changed size is taken as unrelated: a tie is lost, nothing else.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

Row = tuple[int, ...]
"""The atoms of one dimension; () for a dimension of size 1."""


class Dimensions:
    """Atoms, which of them are one, and where they are summed over.

    Attributes:
        params: path of a parameter to the row of each of its dimensions.
        products: of every product and lookup, the atoms it sums over and the output's size.
        reductions: likewise of sums, maxima and the like.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._parent: list[int] = []
        self._parts: dict[int, Row] = {}
        self.params: dict[str, list[Row]] = {}
        self.products: list[tuple[Row, int]] = []
        self.reductions: list[tuple[Row, int]] = []
        self._hidden: list[Row] = []

    def size(self, atom: int) -> int:
        """Returns the size of an atom."""
        return self._sizes[atom]

    def leading(self, path: str) -> list[int]:
        """Returns the major atom of each dimension of a parameter; -1 for a size of 1."""
        rows = [self.leaves(row) for row in self.params[path]]
        return [row[0] if row else -1 for row in rows]

    @property
    def hidden(self) -> set[int]:
        """Atoms that products make and consume or put out, and the rows of looked-up tables."""
        return {atom for row in self._hidden for atom in self.leaves(row)}

    def fresh(self, shape: Sequence[int]) -> list[Row]:
        """Returns rows of new atoms."""
        return [() if size == 1 else (self._atom(size),) for size in shape]

    def _atom(self, size: int) -> int:
        self._sizes.append(size)
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def _find(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = atom = self._parent[self._parent[atom]]
        return atom

    def leaves(self, row: Row) -> Row:
        """Returns the atoms of a row as they are now: united, and cut where they have been cut."""
        found: list[int] = []
        for atom in row:
            atom = self._find(atom)
            found += self.leaves(self._parts[atom]) if atom in self._parts else [atom]
        return tuple(found)

    def _cut(self, atom: int, major: int) -> Row:
        """Cuts a leaf into an atom of size `major` and one of the rest."""
        parts = (self._atom(major), self._atom(self._sizes[atom] // major))
        self._parts[atom] = parts
        return parts

    def unite(self, left: Row, right: Row) -> None:
        """Says that two dimensions of one size are the same."""
        a, b = list(self.leaves(left)), list(self.leaves(right))
        while a and b:
            first, second = a[0], b[0]
            if first == second:
                a, b = a[1:], b[1:]
            elif self._sizes[first] == self._sizes[second]:
                self._parent[second] = first
                a, b = a[1:], b[1:]
            elif self._sizes[first] % self._sizes[second] == 0:
                a[:1] = self._cut(first, self._sizes[second])
            elif self._sizes[second] % self._sizes[first] == 0:
                b[:1] = self._cut(second, self._sizes[first])
            else:
                return
            # A cut or a union may have changed what stands further right.
            a, b = list(self.leaves(tuple(a))), list(self.leaves(tuple(b)))

    def reshape(self, rows: Sequence[Row], shape: Sequence[int]) -> list[Row]:
        """Returns the rows of a reshaped array."""
        atoms = [atom for row in rows for atom in self.leaves(row)]
        result: list[Row] = []
        for size in shape:
            row: list[int] = []
            while math.prod(self._sizes[a] for a in row) < size and atoms:
                missing = size // math.prod(self._sizes[a] for a in row)
                atom = atoms.pop(0)
                if self._sizes[atom] > missing:
                    if self._sizes[atom] % missing:
                        return self.fresh(shape)
                    before = self._sizes[atom]
                    atom, rest = self._cut(atom, missing)
                    assert before == self._sizes[atom] * self._sizes[rest]
                    atoms = [*self.leaves((rest, *atoms))]
                row.append(atom)
            if math.prod(self._sizes[a] for a in row) != size:
                return self.fresh(shape)
            result.append(tuple(row))
        return result

    def contract(self, rows: Sequence[Row], hidden: Sequence[Row], size: int) -> None:
        """Notes a product that sums over `rows` and has an output of `size` numbers.

        Args:
            rows: the dimensions summed over.
            hidden: dimensions that may be split for it.
            size: numbers in the output.
        """
        self.products.append((tuple(atom for row in rows for atom in row), size))
        self._hidden += hidden


def trace(function: Callable[..., Any], params: Mapping[str, Any], arguments: tuple) -> Dimensions:
    """Returns the dimensions of `function(params, *arguments)`, traced without computing.

    Args:
        function: of a flat dict of parameters and further arguments.
        params: path to parameter, as arrays or `jax.ShapeDtypeStruct`s.
        arguments: further arguments, likewise.
    """
    closed = jax.make_jaxpr(function)(dict(params), *arguments)
    found = Dimensions()
    inputs = [found.fresh(leaf.shape) for leaf in jax.tree.leaves((dict(params), arguments))]
    found.params = dict(zip(sorted(params), inputs, strict=False))  # as jax orders a dict's leaves
    _run(found, closed.jaxpr, inputs)
    return found


Rows = list[Row]


def _run(found: Dimensions, jaxpr: Jaxpr, inputs: Sequence[Rows]) -> list[Rows]:
    rows: dict[Any, Rows] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(var: Any) -> Rows:
        known: Rows | None = None if isinstance(var, Literal) else rows.get(var)
        return found.fresh(getattr(var.aval, "shape", ())) if known is None else known

    for equation in jaxpr.eqns:
        handler = _HANDLERS.get(equation.primitive.name, _default)
        outputs = handler(found, equation, [read(var) for var in equation.invars])
        rows.update(zip(equation.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _default(found: Dimensions, equation: Any, inputs: list[Rows]) -> list[Rows]:
    """Runs a function inside the equation, or ties what keeps its place and size.

    The latter holds for elementwise operations, slices, concatenations and updates.
    """
    inner = [v for v in equation.params.values() if isinstance(v, ClosedJaxpr | Jaxpr)]
    if inner and len(_open(inner[0]).invars) == len(inputs):
        return _run(found, _open(inner[0]), inputs)
    shapes = [var.aval.shape for var in equation.invars]
    results = []
    for output in equation.outvars:
        rows = found.fresh(output.aval.shape)
        for other, shape in zip(inputs, shapes, strict=True):
            if len(shape) != len(rows):
                continue
            for i, size in enumerate(output.aval.shape):
                if shape[i] == size:
                    found.unite(rows[i], other[i])
        results.append(rows)
    return results


def _open(jaxpr: Any) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _tie(found: Dimensions, left: Rows, right: Rows) -> None:
    for a, b in zip(left, right, strict=True):
        found.unite(a, b)


def _dot(found: Dimensions, equation: Any, inputs: list[Rows]) -> list[Rows]:
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = inputs
    for a, b in zip((*left_sum, *left_batch), (*right_sum, *right_batch), strict=True):
        found.unite(left[a], right[b])
    free_left = [r for i, r in enumerate(left) if i not in (*left_sum, *left_batch)]
    free_right = [r for i, r in enumerate(right) if i not in (*right_sum, *right_batch)]
    output = [left[i] for i in left_batch] + free_left + free_right
    size = math.prod(equation.outvars[0].aval.shape)
    found.contract([left[i] for i in left_sum], free_left + free_right, size)
    return [output]


def _convolve(found: Dimensions, equation: Any, inputs: list[Rows]) -> list[Rows]:
    numbers = equation.params["dimension_numbers"]
    image, kernel = inputs
    if equation.params["feature_group_count"] == 1:
        found.unite(image[numbers.lhs_spec[1]], kernel[numbers.rhs_spec[1]])
    shape = equation.outvars[0].aval.shape
    output = found.fresh(shape)
    output[numbers.out_spec[0]] = image[numbers.lhs_spec[0]]
    output[numbers.out_spec[1]] = kernel[numbers.rhs_spec[0]]
    summed = [kernel[numbers.rhs_spec[1]]]
    found.contract(summed, [kernel[numbers.rhs_spec[0]]], math.prod(shape))
    return [output]


def _gather(found: Dimensions, equation: Any, inputs: list[Rows]) -> list[Rows]:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    table, indices = inputs[0], inputs[1][:-1]
    shape = equation.outvars[0].aval.shape
    output = found.fresh(shape)
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [i for i in range(len(table)) if i not in gone]
    whole = equation.invars[0].aval.shape
    for place, i in zip(numbers.offset_dims, kept, strict=True):
        if sizes[i] == whole[i]:
            output[place] = table[i]
    others = [place for place in range(len(shape)) if place not in numbers.offset_dims]
    for place, row in zip(others, indices, strict=False):
        output[place] = row
    looked_up = [table[i] for i in numbers.collapsed_slice_dims]
    found.contract(looked_up, looked_up, math.prod(shape))
    return [output]


def _broadcast(found: Dimensions, equation: Any, inputs: list[Rows]) -> list[Rows]:
    shape = equation.params["shape"]
    before, output = equation.invars[0].aval.shape, found.fresh(shape)
    for i, place in enumerate(equation.params["broadcast_dimensions"]):
        if before[i] == shape[place]:
            output[place] = inputs[0][i]
    return [output]


def _reduce(found: Dimensions, equation: Any, inputs: list[Rows]) -> list[Rows]:
    axes = equation.params["axes"]
    size = math.prod(equation.outvars[0].aval.shape)
    found.reductions.append((tuple(a for i in axes for a in inputs[0][i]), size))
    output = [row for i, row in enumerate(inputs[0]) if i not in axes]
    return [output for _ in equation.outvars]


def _scan(found: Dimensions, equation: Any, inputs: list[Rows]) -> list[Rows]:
    constants, carried = equation.params["num_consts"], equation.params["num_carry"]
    first = constants + carried
    each = [rows[1:] for rows in inputs[first:]]
    before = len(found.products), len(found.reductions)
    outputs = _run(found, equation.params["jaxpr"].jaxpr, [*inputs[:first], *each])
    for kept, start in zip((found.products, found.reductions), before, strict=True):
        kept[start:] = [(atoms, size * equation.params["length"]) for atoms, size in kept[start:]]
    for old, new in zip(inputs[constants:first], outputs[:carried], strict=True):
        _tie(found, old, new)
    stacked = [
        [*found.fresh(var.aval.shape[:1]), *rows]
        for var, rows in zip(equation.outvars[carried:], outputs[carried:], strict=True)
    ]
    return [*outputs[:carried], *stacked]


def _while(found: Dimensions, equation: Any, inputs: list[Rows]) -> list[Rows]:
    skipped = equation.params["cond_nconsts"]
    constants = equation.params["body_nconsts"]
    state = inputs[skipped + constants :]
    outputs = _run(found, equation.params["body_jaxpr"].jaxpr, inputs[skipped:])
    for old, new in zip(state, outputs, strict=True):
        _tie(found, old, new)
    return outputs


def _branches(found: Dimensions, equation: Any, inputs: list[Rows]) -> list[Rows]:
    results = [_run(found, b.jaxpr, inputs[1:]) for b in equation.params["branches"]]
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            _tie(found, left, right)
    return results[0]


def _transpose(found: Dimensions, equation: Any, inputs: list[Rows]) -> list[Rows]:
    return [[inputs[0][i] for i in equation.params["permutation"]]]


def _reshape(found: Dimensions, equation: Any, inputs: list[Rows]) -> list[Rows]:
    return [found.reshape(inputs[0], equation.outvars[0].aval.shape)]


def _custom(found: Dimensions, equation: Any, inputs: list[Rows]) -> list[Rows]:
    return _run(found, _open(equation.params["call_jaxpr"]), inputs)


_HANDLERS: dict[str, Callable[[Dimensions, Any, list[Rows]], list[Rows]]] = (
    {
        "broadcast_in_dim": _broadcast,
        "cond": _branches,
        "conv_general_dilated": _convolve,
        "custom_jvp_call": _custom,
        "custom_vjp_call": _custom,
        "dot_general": _dot,
        "gather": _gather,
        "reshape": _reshape,
        "scan": _scan,
        "squeeze": _reshape,
        "transpose": _transpose,
        "while": _while,
    }
    | {f"reduce_{kind}": _reduce for kind in ("sum", "max", "min", "prod", "and", "or")}
    | {kind: _reduce for kind in ("argmax", "argmin")}
)
