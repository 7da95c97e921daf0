"""How the dimensions of a program's inputs hang together, read off its jaxpr.

The program is walked operation by operation with labels (`dimensions`) in place of numbers. What
an operation does to a dimension is in the table `_RULES`; an operation that isn't there fixes all
that it touches, so that what is left free is free whatever the program does.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lamina.platform.merging import dimensions
from lamina.platform.merging.dimensions import Atom, Dim, Label, expand, fix, new, unify
from lamina.platform.merging.loops import scan_sizes

_Given = tuple[Atom, ...]

_ELEMENTWISE = frozenset({
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma",
    "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "imag",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "name", "ne", "neg", "nextafter", "not", "or", "pow", "real", "reduce_precision",
    "rem", "round", "rsqrt", "select_n", "sharding_constraint", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
})  # fmt: skip
"""Operations that compute each entry from the entries at its place."""
_REDUCTIONS = frozenset({
    "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
    "reduce_xor",
})  # fmt: skip
"""Reductions that don't depend on the order."""
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
            known[variable] = _unknown(variable)

        def label_of(variable: Any) -> Label:
            return known[variable] if not hasattr(variable, "val") else _unknown(variable)

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
        if name in _ELEMENTWISE:
            shape = equation.outvars[0].aval.shape
            return [_elementwise(labels, shape)] * len(equation.outvars)
        if name in _REDUCTIONS:
            (label,) = labels
            axes = equation.params["axes"]
            return [tuple(dim for i, dim in enumerate(label) if i not in axes)]
        if name in _RULES:
            return _RULES[name](equation, labels)
        fix(dim for label in labels for dim in label)
        return [_unknown(variable) for variable in equation.outvars]

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


def _unknown(variable: Any) -> Label:
    """An array whose entries are in an order that matters."""
    return tuple(new(size, fixed=True) for size in variable.aval.shape)


def _elementwise(labels: Sequence[Label], shape: Sequence[int]) -> Label:
    result = tuple(dimensions.equal(size) for size in shape)
    for label in labels:
        if len(label) == len(shape):
            result = tuple(unify(a, b) for a, b in zip(result, label, strict=True))
    return result


def _kept(label: Label, whole: Sequence[bool], shape: Sequence[int]) -> Label:
    """Keeps the dimensions that are `whole`, and fixes the others."""
    fix(dim for dim, keep in zip(label, whole, strict=True) if not keep)
    return tuple(
        dim if keep else new(size, fixed=True)
        for dim, keep, size in zip(label, whole, shape, strict=True)
    )


def _shape(equation: Any) -> tuple[int, ...]:
    return equation.outvars[0].aval.shape


def _broadcast(equation: Any, labels: list[Label]) -> list[Label]:
    shape = _shape(equation)
    result = [dimensions.equal(size) for size in shape]
    for dim, place in zip(labels[0], equation.params["broadcast_dimensions"], strict=True):
        result[place] = dim or dimensions.equal(shape[place])
    return [tuple(result)]


def _reshape(equation: Any, labels: list[Label]) -> list[Label]:
    return [dimensions.reshape(labels[0], _shape(equation))]


def _transpose(equation: Any, labels: list[Label]) -> list[Label]:
    return [tuple(labels[0][i] for i in equation.params["permutation"])]


def _dot_general(equation: Any, labels: list[Label]) -> list[Label]:
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = labels
    for i, j in zip(left_sum, right_sum, strict=True):
        unify(left[i], right[j])
    batch = [unify(left[i], right[j]) for i, j in zip(left_batch, right_batch, strict=True)]
    rest = [dim for i, dim in enumerate(left) if i not in (*left_sum, *left_batch)]
    rest += [dim for j, dim in enumerate(right) if j not in (*right_sum, *right_batch)]
    return [(*batch, *rest)]


def _convolution(equation: Any, labels: list[Label]) -> list[Label]:
    p, (images, kernel) = equation.params, labels
    numbers = p["dimension_numbers"]
    batch, channels, *space = numbers.lhs_spec
    outputs, inputs, *window = numbers.rhs_spec
    fix([*(images[i] for i in space), *(kernel[i] for i in window)])
    if p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
        fix([*images, *kernel])
    else:
        unify(images[channels], kernel[inputs])
    result = list(_unknown(equation.outvars[0]))
    result[numbers.out_spec[0]] = images[batch]
    if p["feature_group_count"] == 1 and p["batch_group_count"] == 1:
        result[numbers.out_spec[1]] = kernel[outputs]
    return [tuple(result)]


def _concatenate(equation: Any, labels: list[Label]) -> list[Label]:
    axis, shape = equation.params["dimension"], _shape(equation)
    others = _elementwise(
        [(*label[:axis], *label[axis + 1 :]) for label in labels], _less(shape, axis)
    )
    dims = [label[axis] for label in labels]
    sizes = {_size(dim) for dim in dims}
    if len(sizes) == 1 and len(dims) > 1 and sizes != {1}:
        # Copies beside each other, as the shifted views of a convolution by patches, may be
        # permuted if all are permuted alike; fixed ones stay fixed.
        one = dims[0]
        for dim in dims[1:]:
            one = unify(one, dim)
        joined: Dim = (*new(len(dims), fixed=True), *one)
    else:
        fix(dims)
        joined = new(shape[axis], fixed=True)
    return [(*others[:axis], joined, *others[axis:])]


def _stack(equation: Any, labels: list[Label]) -> list[Label]:
    axis, shape = equation.params["axis"], _shape(equation)
    others = _elementwise(labels, _less(shape, axis))
    return [(*others[:axis], new(shape[axis], fixed=True), *others[axis:])]


def _split(equation: Any, labels: list[Label]) -> list[Label]:
    axis = equation.params["axis"]
    fix([labels[0][axis]])
    outputs = []
    for variable in equation.outvars:
        part = new(variable.aval.shape[axis], fixed=True)
        outputs.append((*labels[0][:axis], part, *labels[0][axis + 1 :]))
    return outputs


def _same_size(equation: Any, labels: list[Label]) -> list[Label]:
    """Slices and windows: a dimension that is as long as before is taken whole."""
    before, after = equation.invars[0].aval.shape, _shape(equation)
    return [_kept(labels[0], [a == b for a, b in zip(before, after, strict=True)], after)]


def _pad(equation: Any, labels: list[Label]) -> list[Label]:
    padded = equation.params["padding_config"]
    return [_kept(labels[0], [not any(each) for each in padded], _shape(equation))]


def _window(equation: Any, labels: list[Label]) -> list[Label]:
    p = equation.params
    whole = [
        size == stride == dilation == 1 and not any(padding)
        for size, stride, dilation, padding in zip(
            p["window_dimensions"],
            p["window_strides"],
            p["window_dilation"],
            p["padding"],
            strict=True,
        )
    ]
    return [_kept(labels[0], whole, _shape(equation))]


def _update_slice(equation: Any, labels: list[Label]) -> list[Label]:
    operand, update, *_ = labels
    sizes = [v.aval.shape for v in equation.invars[:2]]
    result = []
    for one, two, size, part in zip(operand, update, *sizes, strict=True):
        if size == part:
            result.append(unify(one, two))
        else:
            fix([one, two])
            result.append(one)
    return [tuple(result)]


def _gather(equation: Any, labels: list[Label]) -> list[Label]:
    """A look-up: the dimensions that are taken whole keep their order, the others are fixed."""
    p, (operand, indices) = equation.params, labels
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    shape = equation.invars[0].aval.shape
    fix(indices)
    batching = (*numbers.operand_batching_dims, *numbers.collapsed_slice_dims)
    window = [i for i in range(len(shape)) if i not in batching]
    kept = [i for i in window if sizes[i] == shape[i] and i not in numbers.start_index_map]
    fix(operand[i] for i in range(len(shape)) if i not in kept)
    result = list(_unknown(equation.outvars[0]))
    for place, i in zip(numbers.offset_dims, window, strict=True):
        if i in kept:
            result[place] = operand[i]
    return [tuple(result)]


def _iota(equation: Any, labels: list[Label]) -> list[Label]:
    result = [dimensions.equal(size) for size in _shape(equation)]
    place = equation.params["dimension"]
    result[place] = new(_shape(equation)[place], fixed=True)
    return [tuple(result)]


def _squeeze(equation: Any, labels: list[Label]) -> list[Label]:
    gone = equation.params["dimensions"]
    return [tuple(dim for i, dim in enumerate(labels[0]) if i not in gone)]


def _along(key: str) -> Callable[[Any, list[Label]], list[Label]]:
    """Operations along some dimensions, such as cumulative sums: these are fixed."""

    def rule(equation: Any, labels: list[Label]) -> list[Label]:
        found = equation.params[key]
        places = found if isinstance(found, tuple) else (found,)
        fix(label[i] for label in labels for i in places)
        return list(labels)

    return rule


def _arg_reduction(equation: Any, labels: list[Label]) -> list[Label]:
    axes = equation.params["axes"]
    fix(labels[0][i] for i in axes)
    return [tuple(dim for i, dim in enumerate(labels[0]) if i not in axes)]


def _pass_through(equation: Any, labels: list[Label]) -> list[Label]:
    return list(labels)


def _less(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return tuple(size for i, size in enumerate(shape) if i != axis)


def _size(dim: Dim) -> int:
    return math.prod(dimensions.size_of(factor) for factor in expand(dim))


_RULES: dict[str, Callable[[Any, list[Label]], list[Label]]] = {
    "argmax": _arg_reduction,
    "argmin": _arg_reduction,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "cumlogsumexp": _along("axis"),
    "cummax": _along("axis"),
    "cummin": _along("axis"),
    "cumprod": _along("axis"),
    "cumsum": _along("axis"),
    "dot_general": _dot_general,
    "dynamic_slice": _same_size,
    "dynamic_update_slice": _update_slice,
    "gather": _gather,
    "iota": _iota,
    "optimization_barrier": _pass_through,
    "pad": _pad,
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "reduce_window_sum": _window,
    "reshape": _reshape,
    "rev": _along("dimensions"),
    "slice": _same_size,
    "sort": _along("dimension"),
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
}
"""Primitive to its rule `(equation, labels of the inputs) -> labels of the outputs`."""
