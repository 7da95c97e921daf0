"""Mergers: pure functions from parameter trees to a parameter tree.

They can be jitted, vmapped over stacked models, and run on sharded arrays: only `weights`, `base`
and the models are arrays, and nothing depends on the devices.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.checkpoints.names import flatten, nearest, path_name
from lamina.platform.errors import UserError
from lamina.platform.merging import random, trimming
from lamina.platform.merging.method import Drop, Method, Trim

Tree = Any
Axes = tuple[str | None, ...]


TAKES: Mapping[str, tuple[str, ...]] = {
    "": (),
    "fishers": ("fishers",),
    "grams": ("grams",),
    "labeled": ("loss", "batches", "held"),
    "score": ("score",),
    "spec": ("spec",),
    "unlabeled": ("loss", "batches", "held"),
}
"""What a merger needs besides models, to the arguments of its call."""


class Merger(NamedTuple):
    """A method of merging; call it as `merger(models, base=..., weights=..., axes=...)`.

    Attributes:
        name: of the method.
        apply: the function behind the call.
        needs_base: whether the models must share a base, from which they were fine-tuned.
        leafwise: whether tensors are merged one by one (apart from a few numbers of all of them),
            so that files of any size can be merged in pieces.
        method: the formulas of a leaf-wise method.
        needs: what the call takes besides, one of `TAKES`; "" for nothing.
        fit: of a learned merge, as `apply`, but returns a `learned.Learned`.
    """

    name: str
    apply: Callable[..., Tree]
    needs_base: bool
    leafwise: bool
    method: Method | None = None
    needs: str = ""
    fit: Callable[..., Any] | None = None

    def __call__(
        self,
        models: Sequence[Tree],
        *,
        base: Tree = None,
        weights: Any = None,
        axes: Tree = None,
        **given: Any,
    ) -> Tree:
        """Merges parameter trees.

        Floating leaves are computed in float32 (float64 if they are that) and rounded once, to the
        dtype of the base's leaf, or of the first model's. Other leaves are taken from there.

        Args:
            models: trees of one structure and the same shapes.
            base: the tree they were fine-tuned from; ignored by methods that need none.
            weights: one number for each model. Default: 1 each.
            axes: the tree's logical axes, as `FunctionalModel.axes`: with them the layers of a
                stack are merged one by one where the method looks at tensors as a whole, and
                kernels are seen as matrices. Default: no stacks, and the last dimension of a
                tensor is its outputs.
            **given: what a method with data of its own needs, such as `fishers`.

        Raises:
            UserError: too few or too many models, no base, trees that don't fit each other (the
                message names the leaf), weights that don't fit, or an argument that isn't taken.
        """
        if isinstance(models, Mapping) or not isinstance(models, Iterable):
            kind = type(models).__name__
            raise UserError(f"{self.name}: models should be a sequence of trees, not one {kind}")
        for name in set(given) - set(TAKES.get(self.needs, given)):
            raise UserError(f"{self.name} takes no {name}=")
        try:
            return self.apply(list(models), base=base, weights=weights, axes=axes, **given)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error


def leafwise(name: str, method: Method) -> Merger:
    """Returns the merger of a leaf-wise method."""
    # One program for all leaves: an operation at a time would compile each of them.
    compute = jax.jit(functools.partial(_compute, method), static_argnums=0)

    def apply(models, *, base=None, weights=None, axes=None, **given) -> Tree:
        besides = list(given.get(method.needs, ()))
        if method.base and base is None:
            raise ValueError("needs a base: the parameters that the models were fine-tuned from")
        if method.needs and len(besides) != len(models):
            raise ValueError(f"needs {method.needs}=, one for each of the {len(models)} models")
        leaves = fit(models, base if method.base else None, axes, besides)
        weights = method.weights(len(models), weights)
        merged = [
            b if method.base else m[0] for m, b in zip(leaves.models, leaves.base, strict=True)
        ]
        chosen = [n for n in range(len(leaves.names)) if leaves.floating(n)]
        pick = lambda values: [values[n] for n in chosen]
        dtypes = tuple(merged[n].dtype for n in chosen)
        layout = _Layout(tuple(pick(leaves.names)), tuple(pick(leaves.axes)), dtypes)
        computed = compute(layout, pick(leaves.models), pick(leaves.base), weights)
        for n, value in zip(chosen, computed, strict=True):
            merged[n] = value
        return leaves.rebuild(merged)

    return Merger(name, apply, method.base, True, method, method.needs)


class Leaves(NamedTuple):
    """Trees that fit each other, as lists of leaves.

    Attributes:
        names: '/'-joined paths.
        models: for each name the arrays of the models, and of what they come with besides.
        base: for each name the base's array, or None.
        axes: for each name its logical axes.
        rebuild: makes a tree of merged leaves.
    """

    names: list[str]
    models: list[list[Any]]
    base: list[Any]
    axes: list[Axes]
    rebuild: Callable[[list[Any]], Tree]

    def floating(self, number: int) -> bool:
        """Tells whether a leaf holds floating-point numbers; others aren't merged."""
        return _floating(self.models[number][0])


def fit(models: Sequence[Tree], base: Tree, axes: Tree, besides: Sequence[Tree] = ()) -> Leaves:
    """Lines up the leaves of trees.

    Args:
        models: the models.
        base: their base, or None.
        axes: logical axes, or None.
        besides: trees like the models, one that each comes with.

    Raises:
        ValueError: there is no model, or a leaf is missing, superfluous, of another shape or kind.
    """
    if not models:
        raise ValueError("there are no models to merge")
    sources = {f"model {number}": tree for number, tree in enumerate(models)}
    sources |= {f"what model {number} comes with": tree for number, tree in enumerate(besides)}
    sources |= {} if base is None else {"the base": base}
    flat = {source: flatten(tree) for source, tree in sources.items()}
    first = flat["model 0"]
    for source, leaves in flat.items():
        for name in [*first, *leaves]:
            if name not in leaves:
                raise ValueError(f"{source} has no {name!r}{nearest(name, leaves)}")
            if name not in first:
                raise ValueError(f"{source} has {name!r}, which model 0 has not")
            if np.shape(leaves[name]) != np.shape(first[name]):
                raise ValueError(
                    f"{name!r} has shape {np.shape(leaves[name])} in {source} and "
                    f"{np.shape(first[name])} in model 0"
                )
    arrays = {
        source: {name: _array(leaf, name, source) for name, leaf in leaves.items()}
        for source, leaves in flat.items()
    }
    for source, leaves in arrays.items():
        for name, leaf in leaves.items():
            if _floating(leaf) != _floating(arrays["model 0"][name]):
                raise ValueError(
                    f"{name!r} is {leaf.dtype} in {source} and {arrays['model 0'][name].dtype} in "
                    "model 0: floating-point numbers don't mix with others"
                )
    ends = arrays.pop("the base", None)
    treedef = jax.tree.structure(models[0])
    return Leaves(
        list(first),
        [[leaves[name] for leaves in arrays.values()] for name in first],
        [ends[name] if ends else None for name in first],
        _axes_of(axes, list(first), first),
        lambda merged: jax.tree.unflatten(treedef, merged),
    )


def _array(leaf: Any, name: str, source: str) -> Any:
    """Returns a leaf as an array: Python numbers and the like as jit would make them."""
    try:
        array = jnp.asarray(leaf)
    except TypeError as error:
        raise ValueError(f"{name!r} in {source} is no array: {type(leaf).__name__}") from error
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{name!r} in {source} is {array.dtype}: only real numbers are merged")
    return array


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _axes_of(axes: Tree, names: list[str], leaves: dict[str, Any]) -> list[Axes]:
    if axes is None:
        return [(None,) * np.ndim(leaves[name]) for name in names]
    flat, _ = jax.tree_util.tree_flatten_with_path(axes, is_leaf=_are_axes)
    given = {path_name(path): value for path, value in flat}
    for name in names:
        if len(given.get(name, ())) != np.ndim(leaves[name]):
            raise ValueError(
                f"axes of {name!r} are {given.get(name)}, for a leaf of shape "
                f"{np.shape(leaves[name])}"
            )
    return [given[name] for name in names]


def _are_axes(node: Any) -> bool:
    """Tells whether a node of a tree of axes is those of one leaf, and not a tuple of branches."""
    return type(node) is tuple and all(part is None or isinstance(part, str) for part in node)


class _Layout(NamedTuple):
    """What is known of the leaves before anything is computed: hashable, for jit."""

    names: tuple[str, ...]
    axes: tuple[Axes, ...]
    dtypes: tuple[np.dtype, ...]


def _compute(method: Method, layout: _Layout, models, bases, weights) -> list[jax.Array]:
    """Merges the floating leaves; `models` and `bases` have an entry for each."""
    work = [work_dtype([*m, b]) for m, b in zip(models, bases, strict=True)]
    values = [[m.astype(d) for m in each] for each, d in zip(models, work, strict=True)]
    bases = [b.astype(d) if method.base else None for b, d in zip(bases, work, strict=True)]
    factors = [jnp.asarray(weights, d) for d in work]
    if method.prune is not None:
        values = [[v - b for v in each] for each, b in zip(values, bases, strict=True)]
    if isinstance(method.prune, Trim):
        values = _trimmed(method.prune, values, layout.axes)
    numbers: list[Any] = [None] * len(values)
    if method.vote is not None and values:
        votes = [method.vote(jnp, v, f) for v, f in zip(values, factors, strict=True)]
        wide = work_dtype(votes)
        total = jnp.stack([vote.astype(wide) for vote in votes]).sum(0)
        numbers = [total.astype(d) for d in work]
    merged = []
    for name, axes, dtype, *rest in zip(*layout, values, bases, factors, numbers, strict=True):
        value, base, factor, number = rest

        def one(v, b, layer=0, name=name, factor=factor, number=number, axes=axes):
            return _merge_tensor(method, name, v, b, factor, number, axes, layer)

        merged.append(per_layer(one, axes, value, base).astype(dtype))
    return merged


def _merge_tensor(method: Method, name, values, base, weights, numbers, axes: Axes, layer):
    """Merges one tensor, or one layer of a stack."""
    if method.whole is not None:
        return method.whole(jnp, values, base, weights, without_layers(axes))
    if isinstance(method.prune, Drop):
        values, numbers = _dropped(method, name, values, weights, layer)
    if method.measure is not None and method.settle is not None:
        numbers = method.settle(jnp, method.measure(jnp, values, base), weights)
    assert method.combine is not None
    return method.combine(jnp, values, base, weights, numbers)


def _dropped(method: Method, name: str, values, weights, layer):
    drop = method.prune
    assert isinstance(drop, Drop) and method.settle is not None
    size = values[0].size
    places = jnp.arange(size, dtype=jnp.uint32) + jnp.uint32(size) * jnp.uint32(layer)
    kept = []
    (keys,) = random.tensor_keys(drop.seed, [name], len(values))
    for key, value in zip(keys, values, strict=True):
        stays = random.keeps(jnp, key, places, drop.density).reshape(value.shape)
        kept.append(value * stays.astype(value.dtype))
    magnitudes = [jnp.stack([jnp.abs(v).sum() for v in each]) for each in (values, kept)]
    return kept, method.settle(jnp, jnp.stack(magnitudes), weights)


def _trimmed(trim: Trim, values, axes: Sequence[Axes]):
    """Returns the task vectors with their small entries set to zero."""
    if not values:
        return values
    count = len(values[0])
    stacked = [jnp.stack(deltas) for deltas in values]
    # One program for all models, run for one after the other.
    if trim.per_tensor:
        one = lambda delta: trimming.trim([delta], trim.density)[0]
        by_layer = [jax.vmap(one) if a and a[0] == "layers" else one for a in axes]
        cut = [jax.lax.map(f, s) for f, s in zip(by_layer, stacked, strict=True)]
    else:
        cut = jax.lax.map(lambda deltas: trimming.trim(deltas, trim.density), stacked)
    return [[c[number] for number in range(count)] for c in cut]


def per_layer(function: Callable[..., Any], axes: Axes, values: Any, base: Any) -> Any:
    """Calls `function(values, base, layer=i)` for each layer of a stack, or once for a tensor."""
    if not axes or axes[0] != "layers":
        return function(values, base)
    numbers = jnp.arange(values[0].shape[0], dtype=jnp.uint32)
    return jax.vmap(lambda v, b, i: function(v, b, layer=i))(values, base, numbers)


def without_layers(axes: Axes) -> Axes:
    """Returns the axes of one layer of a stack."""
    return axes[1:] if axes and axes[0] == "layers" else axes


def work_dtype(arrays: Sequence[Any]) -> np.dtype:
    """Returns the dtype to compute in: float32, or float64 where an input has it."""
    wide = any(array is not None and array.dtype == np.float64 for array in arrays)
    return np.dtype(np.float64 if wide else np.float32)
