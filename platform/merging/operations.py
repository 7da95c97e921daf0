"""What operations do to the dimensions of their arrays: a rule for each primitive of JAX.

A rule takes the equation of a jaxpr and the labels of its inputs, which it unifies or fixes, and
returns the labels of its outputs (see `dimensions`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from lamina.platform.merging import dimensions
from lamina.platform.merging.dimensions import Dim, Label, expand, fix, new, unify

ELEMENTWISE = frozenset({
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
REDUCTIONS = frozenset({
    "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
    "reduce_xor",
})  # fmt: skip
"""Reductions that don't depend on the order."""


def unknown(variable: Any) -> Label:
    """Returns the label of an array whose entries are in an order that matters."""
    return tuple(new(size, fixed=True) for size in variable.aval.shape)


def elementwise(labels: Sequence[Label], shape: Sequence[int]) -> Label:
    """Returns the label of what is computed place by place; scalars fit anything."""
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
    if p["batch_group_count"] != 1:
        fix([*images, *kernel])
        return [unknown(equation.outvars[0])]
    # Channels are counted group by group, on both sides; without groups there is one.
    groups = p["feature_group_count"]
    group, inside = new(groups), new(equation.invars[1].aval.shape[outputs] // groups)
    unify(images[channels], (*group, *kernel[inputs]))
    result = list(unknown(equation.outvars[0]))
    result[numbers.out_spec[0]] = images[batch]
    result[numbers.out_spec[1]] = unify(kernel[outputs], (*group, *inside))
    return [tuple(result)]


def _concatenate(equation: Any, labels: list[Label]) -> list[Label]:
    axis, shape = equation.params["dimension"], _shape(equation)
    others = elementwise(
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
    others = elementwise(labels, _less(shape, axis))
    return [(*others[:axis], new(shape[axis], fixed=True), *others[axis:])]


def _split(equation: Any, labels: list[Label]) -> list[Label]:
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    label = labels[0]
    if len(set(sizes)) > 1:
        fix([label[axis]])
        parts = [new(size, fixed=True) for size in sizes]
    else:  # parts of one length may be permuted if all are permuted alike
        part = new(sizes[0])
        unify(label[axis], (*new(len(sizes), fixed=True), *part))
        parts = [part] * len(sizes)
    return [(*label[:axis], part, *label[axis + 1 :]) for part in parts]


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
    result = list(unknown(equation.outvars[0]))
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


RULES: dict[str, Callable[[Any, list[Label]], list[Label]]] = {
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
