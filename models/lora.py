"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) as pure functions over parameter trees.

An adapter of a kernel W is a pair of matrices A ``[rows, rank]`` and B ``[rank, columns]``; the
model runs with

    W + (alpha / rank) A B

Kernels of more dimensions are seen as matrices by their logical axes, and stacked layers are
adapted layer by layer. Train the adapters with the base held fixed:
``loss(apply(base, adapters, rank=8, alpha=16))``.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lamina.models.axes import LAYERS, matrix_split

Tree = dict[str, Any]


def init(
    key: jax.Array,
    params: Tree,
    *,
    rank: int,
    paths: Sequence[str],
    axes: Tree | None = None,
) -> Tree:
    """Returns adapters for the chosen kernels.

    A starts normal with variance 1 / rows and B at zero, so that the adapted model starts equal
    to the base (section 4.1 of the paper, which leaves the variance open).

    Args:
        key: random key; each path draws its own numbers from it.
        params: the base: nested dicts with string keys.
        rank: at least 1; 4 to 8 in the paper.
        paths: regular expressions, searched in the "/"-joined paths, as ``"query/kernel"``.
            Vectors among the matches are passed over.
        axes: logical axes, as ``FunctionalModel.axes``. Default: None: all dimensions but the last
            are rows.

    Returns:
        The part of the tree that was chosen; each kernel is replaced by ``{"a": A, "b": B}``.

    Raises:
        ValueError: an expression that matches no matrix, or a rank below 1.

    Example:
        >>> base = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones((6,))}}
        >>> adapters = init(jax.random.key(0), base, rank=2, paths=("dense",))
        >>> jax.tree.map(jnp.shape, adapters)
        {'dense': {'kernel': {'a': (4, 2), 'b': (2, 6)}}}
    """
    if rank < 1:
        raise ValueError(f"the rank of adapters must be at least 1, not {rank}")
    leaves = dict(_leaves(params))
    found = {path: _split(path, leaf, axes) for path, leaf in leaves.items()}
    splits = {path: split for path, split in found.items() if split}
    matrices = {path: leaves[path] for path in splits}
    for expression in paths:
        if not any(re.search(expression, "/".join(path)) for path in matrices):
            raise ValueError(
                f"no kernel matches {expression!r}; these can be adapted: "
                + ", ".join(sorted("/".join(path) for path in matrices))
            )
    adapters: Tree = {}
    for number, (path, leaf) in enumerate(sorted(matrices.items())):
        if any(re.search(expression, "/".join(path)) for expression in paths):
            pair = _pair(jax.random.fold_in(key, number), leaf, splits[path], rank)
            node = adapters
            for part in path:
                node = node.setdefault(part, {})
            node.update(pair)
    return adapters


def apply(base: Tree, adapters: Tree, *, rank: int, alpha: float) -> Tree:
    """Returns the adapted parameters, ``W + (alpha / rank) A B``.

    Args:
        base: parameters.
        adapters: of ``init``.
        rank: the adapters' rank.
        alpha: scale; the paper sets it to the first rank tried and leaves it.

    Raises:
        ValueError: adapters of another rank, or for a kernel that the base lacks.
    """
    result = dict(base)
    for name, adapter in adapters.items():
        if name not in base:
            raise ValueError(f"there are adapters for {name!r}, but the base has {sorted(base)}")
        if isinstance(base[name], dict):
            result[name] = apply(base[name], adapter, rank=rank, alpha=alpha)
            continue
        if adapter["a"].shape[-1] != rank:
            raise ValueError(
                f"the adapters of {name!r} have rank {adapter['a'].shape[-1]}, not rank={rank}"
            )
        delta = (adapter["a"] @ adapter["b"]).reshape(base[name].shape)
        result[name] = base[name] + ((alpha / rank) * delta).astype(base[name].dtype)
    return result


def merge(base: Tree, adapters: Tree, *, rank: int, alpha: float) -> Tree:
    """Folds adapters into the base for good: the parameters of a plain model, jitted.

    The same sum as ``apply``, which keeps base and adapters apart for training.
    """
    return jax.jit(apply, static_argnames=("rank", "alpha"))(base, adapters, rank=rank, alpha=alpha)


def adapter_axes(adapters: Tree, axes: Tree) -> Tree:
    """Returns the logical axes of adapters: the base's, where one dimension stands for one.

    Args:
        adapters: of ``init``.
        axes: logical axes of the base.
    """
    if isinstance(axes, dict):
        return {name: adapter_axes(adapters[name], axes[name]) for name in adapters}
    first, middle = matrix_split(axes)
    rows, columns = axes[first:middle], axes[middle:]
    return {
        "a": (*axes[:first], rows[0] if len(rows) == 1 else None, None),
        "b": (*axes[:first], None, columns[0] if len(columns) == 1 else None),
    }


def _leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _split(path: tuple[str, ...], leaf: jax.Array, axes: Tree | None) -> tuple[int, int] | None:
    """Returns where the matrix view begins and is cut, or None for what is no matrix."""
    names: Any = axes
    if names is None:
        names = (None,) * leaf.ndim
    else:
        for part in path:
            names = names[part]
    if leaf.ndim - (bool(names) and names[0] == LAYERS) < 2:
        return None
    return matrix_split(names)


def _pair(key: jax.Array, kernel: jax.Array, split: tuple[int, int], rank: int) -> Tree:
    first, middle = split
    layers = kernel.shape[:first]
    rows, columns = math.prod(kernel.shape[first:middle]), math.prod(kernel.shape[middle:])
    normal = jax.random.normal(key, (*layers, rows, rank), kernel.dtype)
    return {"a": normal * rows**-0.5, "b": jnp.zeros((*layers, rank, columns), kernel.dtype)}
