"""Gram matrices of what enters each dense or convolution's kernel of a model, gathered as it runs.

The model needs no hooks: its jaxpr is evaluated here, and wherever a matrix product contracts a
parameter, `X^T X` of its other operand X is added up. Loops over layers give one matrix for each
layer. A convolution is the product of the patches it looks at with its kernel.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from lamina.platform.checkpoints.names import path_name
from lamina.platform.merging.loops import scan_sizes

Tree = Any
Sums = dict[str, tuple[jax.Array, int]]
"""Path of a kernel to (X^T X, how many rows X had)."""

_RENAMES = frozenset({"convert_element_type", "reshape", "copy", "sharding_constraint", "squeeze"})
"""Operations after which a kernel is still that kernel, its numbers in their order."""

_CALLS = frozenset(
    {
        "pjit",
        "jit",
        "closed_call",
        "core_call",
        "checkpoint",
        "remat",
        "remat2",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
    }
)
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class _Origin(NamedTuple):
    """The parameter that a value is; `stacked`: of a scanned stack, one layer."""

    path: str
    stacked: bool = False


def collect(apply: Callable[[Tree, Any], Any], params: Tree, batches: Any) -> dict[str, jax.Array]:
    """Returns the mean over rows of `x x^T` for the inputs x of each dense kernel.

    Pure, to be jitted: one pass over all batches.

    Args:
        apply: (parameters, batch) to anything that the model computes; other arguments of it are
            bound.
        params: the parameters; they may be sharded.
        batches: arrays with leading dimensions [batches, examples].

    Returns:
        Path of a kernel to float32 [inputs, inputs], or [layers, inputs, inputs] of a scanned
        stack (float64 for such inputs). Kernels are here whose leading dimensions are contracted;
        one that the model uses several times counts every use.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    leaves = jax.tree.leaves(params)

    def one(batch: Any) -> tuple[dict[str, jax.Array], dict[str, int]]:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
        closed = jax.make_jaxpr(apply)(shapes, rows)
        given = jax.tree.leaves(batch)
        origins = [*map(_Origin, paths), *[None] * len(given)]
        _, sums = _run(closed.jaxpr, closed.consts, [*leaves, *given], origins)
        return {k: total for k, (total, _) in sums.items()}, {k: n for k, (_, n) in sums.items()}

    first = jax.tree.map(lambda leaf: leaf[0], batches)
    counts: dict[str, int] = {}

    def shapes_of(batch: Any) -> dict[str, jax.Array]:
        sums, found = one(batch)
        counts.update(found)
        return sums

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(shapes_of, first))
    total, _ = jax.lax.scan(
        lambda total, batch: (jax.tree.map(jnp.add, total, one(batch)[0]), None), zeros, batches
    )
    number = jax.tree.leaves(batches)[0].shape[0]
    return {path: gram / (counts[path] * number) for path, gram in total.items()}


def _run(
    jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], origins: Sequence[_Origin | None]
) -> tuple[list[Any], Sums]:
    """Evaluates a jaxpr, and adds up the Gram matrices on the way."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))
    known = {v: o for v, o in zip(jaxpr.invars, origins, strict=True) if o is not None}
    read = lambda v: v.val if isinstance(v, core.Literal) else values[v]
    origin = lambda v: None if isinstance(v, core.Literal) else known.get(v)
    sums: Sums = {}
    for equation in jaxpr.eqns:
        given = [read(v) for v in equation.invars]
        named = [origin(v) for v in equation.invars]
        inner = next((equation.params[k] for k in _INNER if k in equation.params), None)
        found: Sums = {}
        if equation.primitive.name == "scan":
            outputs, found = _scan(equation, given, named)
        elif equation.primitive.name in _CALLS and inner is not None:
            outputs, found = _run(*_opened(inner), given, named)
        else:
            if equation.primitive.name == "dot_general":
                found = _product(equation.params["dimension_numbers"], given, named)
            elif equation.primitive.name == "conv_general_dilated":
                found = _convolution(equation.params, given, named)
            outputs = equation.primitive.bind(*given, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
            if equation.primitive.name in _RENAMES and named[0] is not None:
                known[equation.outvars[0]] = named[0]
        for path, each in found.items():
            sums[path] = _plus(sums.get(path), each)
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars], sums


def _opened(inner: Any) -> tuple[Any, Sequence[Any]]:
    """Returns the jaxpr and the constants of one that is closed, or not."""
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def _plus(one: tuple[jax.Array, int] | None, other: tuple[jax.Array, int]) -> Any:
    return other if one is None else (one[0] + other[0], one[1] + other[1])


def _product(dimensions: Any, given: Sequence[Any], named: Sequence[_Origin | None]) -> Sums:
    """The Gram matrix of one matrix product, if it contracts a kernel's leading dimensions."""
    contracted, batched = dimensions
    for side in (0, 1):
        kernel, other = named[side], 1 - side
        ours, theirs = tuple(contracted[side]), tuple(contracted[other])
        if kernel is None or named[other] is not None or batched[0]:
            continue
        if not ours or sorted(ours) != list(range(len(ours))) or given[side].ndim == len(ours):
            continue
        x = given[other]
        order = [d for _, d in sorted(zip(ours, theirs, strict=True))]
        return {kernel.path: _gram(x, order)}
    return {}


def _convolution(params: Any, given: Sequence[Any], named: Sequence[_Origin | None]) -> Sums:
    """The Gram matrix of the patches of one convolution without groups."""
    (images, kernel), (_, origin) = given, named
    numbers = params["dimension_numbers"]
    outputs, *seen = numbers.rhs_spec  # input channels, then the window
    grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
    if origin is None or grouped or outputs != kernel.ndim - 1:
        return {}
    keys = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    patches = jax.lax.conv_general_dilated_patches(
        images,
        [kernel.shape[d] for d in seen[1:]],
        dimension_numbers=numbers,
        **{key: params[key] for key in keys},
    )
    rows = jnp.moveaxis(patches, numbers.out_spec[1], -1)
    rows = rows.reshape(*rows.shape[:-1], *(kernel.shape[d] for d in seen))
    order = [rows.ndim - len(seen) + int(place) for place in np.argsort(seen)]
    return {origin.path: _gram(rows, order)}


def _gram(x: jax.Array, order: Sequence[int]) -> tuple[jax.Array, int]:
    """Returns `X^T X` and the rows of X, whose columns are some dimensions of an array in order."""
    rest = [d for d in range(x.ndim) if d not in order]
    size = math.prod(x.shape[d] for d in order)
    flat = jnp.transpose(x, [*rest, *order]).reshape(-1, size)
    wide = jnp.promote_types(flat.dtype, jnp.float32)
    gram = jax.lax.dot_general(flat, flat, (((0,), (0,)), ((), ())), preferred_element_type=wide)
    return gram, flat.shape[0]


def _scan(
    equation: Any, given: Sequence[Any], named: Sequence[_Origin | None]
) -> tuple[list[Any], Sums]:
    """Evaluates a loop; of kernels that it runs over, each step gives a matrix of its own."""
    params = equation.params
    constants, carries = scan_sizes(equation)
    ahead = constants + carries
    loop, consts = _opened(params["jaxpr"])
    inner = [
        *named[:constants],
        *[None] * carries,
        *[None if o is None or o.stacked else _Origin(o.path, True) for o in named[ahead:]],
    ]
    stacked = {o.path for o in inner[ahead:] if o is not None}
    counts: dict[str, int] = {}

    def body(carry: Any, xs: Any) -> tuple[Any, Any]:
        arguments = [*given[:constants], *carry, *xs]
        outputs, sums = _run(loop, consts, arguments, inner)
        counts.update({path: n for path, (_, n) in sums.items()})
        grams = {path: gram for path, (gram, _) in sums.items()}
        return outputs[:carries], (outputs[carries:], grams)

    carry, (ys, grams) = jax.lax.scan(
        body,
        list(given[constants:ahead]),
        list(given[ahead:]),
        length=params["length"],
        reverse=params["reverse"],
    )
    sums = {}
    for path, gram in grams.items():
        once = path in stacked
        rows = counts[path] * (1 if once else params["length"])
        sums[path] = (gram if once else gram.sum(0), rows)
    return [*carry, *ys], sums
