"""How the dimensions of a program's inputs hang together, read off its jaxpr.

The program is walked operation by operation with labels (`dimensions`) in place of numbers. What
an operation does to a dimension is in the table `operations.RULES`; one that isn't there fixes all
that it touches, so that what is left free is free whatever the program does.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lamina.platform.merging import operations
from lamina.platform.merging.dimensions import Atom, Dim, Label, expand, fix, new, unify
from lamina.platform.merging.loops import scan_sizes

_Given = tuple[Atom, ...]

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
"""Operations that run another program, and its parameter."""


class Trace(NamedTuple):
    """What a walk gives.

    Attributes:
        inputs: the labels of the program's inputs.
        outputs: those of its outputs.
        arrays: the atoms of each array on the way, with those that it is given: a layer of a scan
            is given the place in the stack. Not expanded.
    """

    inputs: list[Label]
    outputs: list[Label]
    arrays: list[tuple[Dim, _Given]]


def trace(
    function: Callable[..., Any], inputs: Sequence[tuple[jax.ShapeDtypeStruct, Sequence[bool]]]
) -> Trace:
    """Walks through a function.

    Args:
        function: of arrays, one argument for each of `inputs`.
        inputs: for each its shape and dtype, and which of its dimensions may be permuted.
    """
    closed = jax.make_jaxpr(function)(*(abstract for abstract, _ in inputs))
    labels = [
        tuple(new(size, fixed=not f) for size, f in zip(abstract.shape, free, strict=True))
        for abstract, free in inputs
    ]
    walk = _Walk([])
    outputs = walk.run(closed, labels, ())
    return Trace(labels, outputs, walk.arrays)


class _Walk(NamedTuple):
    """A walk through a program; `arrays` grows."""

    arrays: list[tuple[Dim, _Given]]

    def note(self, label: Label, given: _Given) -> None:
        self.arrays.append((tuple(factor for dim in label for factor in dim), given))

    def run(self, closed: Any, inputs: Sequence[Label], given: _Given) -> list[Label]:
        """Returns the labels of the outputs of a (closed or open) jaxpr."""
        jaxpr = getattr(closed, "jaxpr", closed)
        known: dict[Any, Label] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable in jaxpr.constvars:
            known[variable] = operations.unknown(variable)

        def label_of(variable: Any) -> Label:
            return known[variable] if not hasattr(variable, "val") else operations.unknown(variable)

        for label in inputs:
            self.note(label, given)
        for equation in _live(jaxpr):
            labels = [label_of(variable) for variable in equation.invars]
            outputs = self._equation(equation, labels, given)
            for variable, label in zip(equation.outvars, outputs, strict=True):
                known[variable] = label
                self.note(label, given)
        return [label_of(variable) for variable in jaxpr.outvars]

    def _equation(self, equation: Any, labels: list[Label], given: _Given) -> list[Label]:
        name = equation.primitive.name
        if name in _CALLS:
            return self.run(equation.params[_CALLS[name]], labels, given)
        if name == "scan":
            return self._scan(equation, labels, given)
        if name in operations.ELEMENTWISE:
            shape = equation.outvars[0].aval.shape
            return [operations.elementwise(labels, shape)] * len(equation.outvars)
        if name in operations.REDUCTIONS:
            (label,) = labels
            axes = equation.params["axes"]
            return [tuple(dim for i, dim in enumerate(label) if i not in axes)]
        if name in operations.RULES:
            return operations.RULES[name](equation, labels)
        fix(dim for label in labels for dim in label)
        return [operations.unknown(variable) for variable in equation.outvars]

    def _scan(self, equation: Any, labels: list[Label], given: _Given) -> list[Label]:
        """A body that runs for each place of the first dimension of its stacked inputs."""
        p = equation.params
        constants, carried = scan_sizes(equation)
        consts, carry = labels[:constants], labels[constants : constants + carried]
        stacked = labels[constants + carried :]
        layers = new(p["length"], fixed=True)
        for label in stacked:
            layers = unify(layers, label[0])
        fix([layers])
        inside = (*given, *(atom for atom in expand(layers) if isinstance(atom, Atom)))
        parts = [label[1:] for label in stacked]
        while True:
            for label in (*consts, *carry):
                self.note(label, given)  # the same in all runs: not given the place
            outputs = self.run(p["jaxpr"], [*consts, *carry, *parts], inside)
            after = outputs[:carried]
            before = [_expanded(label) for label in carry]
            carry = [
                tuple(unify(a, b) for a, b in zip(one, two, strict=True))
                for one, two in zip(carry, after, strict=True)
            ]
            if [_expanded(label) for label in carry] == before:
                break
        ys = [(layers, *label) for label in outputs[carried:]]
        return [*carry, *ys]


def _live(jaxpr: Any) -> list[Any]:
    """Returns the operations that the outputs depend on."""
    needed, found = {id(variable) for variable in jaxpr.outvars}, []
    for equation in reversed(jaxpr.eqns):
        if any(id(variable) in needed for variable in equation.outvars):
            needed |= {id(variable) for variable in equation.invars}
            found.append(equation)
    return found[::-1]


def _expanded(label: Label) -> Label:
    return tuple(expand(dim) for dim in label)
