"""Permutations of a model's units that don't change what it computes.

A `Spec` says which dimensions of which parameters are permuted together. A dimension is a product
of factors, the outermost first: the 64 channels before a group norm are 8 groups of 8, the query
heads of grouped-query attention are key heads times the queries of each. A factor's permutation may
depend on the place in other factors of the same parameter: on the layer of a stack, on the head
whose units are permuted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.checkpoints.names import flatten, unflatten
from lamina.platform.errors import UserError

Tree = Any
Permutations = Mapping[str, np.ndarray]
"""Group to int32 `[*sizes of the groups it is given, size]`: new unit i is the old unit p[..., i].

The given groups are counted by their new places.
"""


class Group(NamedTuple):
    """Units that are permuted together.

    Attributes:
        size: how many units.
        given: groups on whose place the permutation depends, each of them before this one.
        permuted: False for one that stays and is only `given`, such as the layers of a stack.
    """

    size: int
    given: tuple[str, ...] = ()
    permuted: bool = True


class Factor(NamedTuple):
    """A factor of a dimension: `size` units, of a group, or of none ("") if they stay."""

    group: str
    size: int


class Spec(NamedTuple):
    """What may be permuted.

    Attributes:
        groups: by name, in an order in which each comes after those it is given.
        leaves: '/'-joined name of a parameter to the factors of each of its dimensions. Batch
            statistics and the like stand under `model_state/`.
    """

    groups: Mapping[str, Group]
    leaves: Mapping[str, tuple[tuple[Factor, ...], ...]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a group's permutations."""
        group = self.groups[name]
        return (*(self.groups[given].size for given in group.given), group.size)

    def permuted(self) -> list[str]:
        """Returns the names of the groups that are permuted."""
        return [name for name, group in self.groups.items() if group.permuted]

    def users(self, name: str) -> list[str]:
        """Returns the names of the leaves that a group permutes."""
        return [leaf for leaf, dims in self.leaves.items() if name in groups_of(dims)]

    def describe(self) -> str:
        """Returns a table of the groups: units, what they depend on, leaves."""
        lines = []
        for name in self.permuted():
            group = self.groups[name]
            each = f" for each of {', '.join(group.given)}" if group.given else ""
            lines.append(f"{name}: {group.size} units{each}, in {', '.join(self.users(name))}")
        return "\n".join(lines)


def groups_of(dims: Sequence[Sequence[Factor]]) -> list[str]:
    """Returns the group of each factor of a leaf, "" for none, outermost first."""
    return [factor.group for dim in dims for factor in dim]


def sizes_of(dims: Sequence[Sequence[Factor]]) -> tuple[int, ...]:
    """Returns the size of each factor of a leaf: the shape in which it is permuted."""
    return tuple(factor.size for dim in dims for factor in dim)


def identity(spec: Spec) -> dict[str, np.ndarray]:
    """Returns permutations that leave everything in its place."""
    return {
        name: np.broadcast_to(np.arange(group.size, dtype=np.int32), spec.shape(name)).copy()
        for name, group in spec.groups.items()
    }


def draw(spec: Spec, seed: int, groups: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Returns random permutations.

    Args:
        spec: what may be permuted.
        seed: each group draws by it and by its own number.
        groups: which ones; the others stay. Default: all.
    """
    found = identity(spec)
    for number, name in enumerate(spec.groups):
        if spec.groups[name].permuted and (groups is None or name in groups):
            rng = np.random.default_rng([seed, number])
            found[name] = rng.permuted(found[name], axis=-1)
    return found


def apply(spec: Spec, permutations: Permutations, tree: Tree) -> Tree:
    """Returns a tree of parameters with its units permuted.

    Args:
        spec: what may be permuted.
        permutations: of its groups; one that is missing stays.
        tree: parameters; with batch statistics as `{**params, "model_state": model_state}`. Leaves
            that the spec doesn't name stay as they are.

    Raises:
        UserError: a leaf hasn't the shape that the spec says.
    """
    flat = flatten(tree)
    return unflatten(
        {
            name: permute(spec, permutations, name, leaf) if name in spec.leaves else leaf
            for name, leaf in flat.items()
        },
        tree,
    )


def permute(
    spec: Spec, permutations: Permutations, name: str, leaf: Any, *, raw: Sequence[int] = ()
) -> Any:
    """Returns one leaf with its units permuted; a numpy array stays one.

    Args:
        spec: what may be permuted.
        permutations: of its groups.
        name: of the leaf.
        leaf: the array.
        raw: numbers of factors of the leaf that stay as they are. Default: none.

    Raises:
        UserError: the leaf's shape doesn't fit the permutations.
    """
    dims = spec.leaves[name]
    if tuple(leaf.shape) != tuple(int(np.prod([f.size for f in dim])) for dim in dims):
        raise UserError(f"{name!r} has shape {tuple(leaf.shape)}, which the permutations don't fit")
    groups = groups_of(dims)
    numpy: Any = np if isinstance(leaf, np.ndarray) else jnp
    value = leaf.reshape(sizes_of(dims))
    for group in spec.groups:  # those that others depend on come first
        for place, found in enumerate(groups):
            stays = not spec.groups[group].permuted or group not in permutations
            if found != group or place in raw or stays:
                continue
            order = permutations[group]
            given = [groups.index(parent) for parent in spec.groups[group].given]
            if not given:
                value = numpy.take(value, order, axis=place)
                continue
            index = _aligned(order, [*given, place], value.ndim)
            value = numpy.take_along_axis(value, numpy.asarray(index), axis=place)
    return value.reshape(leaf.shape)


def _aligned(order: np.ndarray, places: Sequence[int], ndim: int) -> np.ndarray:
    """Returns `order` with its dimensions at `places` of an array of `ndim` dimensions."""
    sequence = np.argsort(places)
    shape = [1] * ndim
    for place, size in zip(places, order.shape, strict=True):
        shape[place] = size
    return order.transpose(sequence).reshape(shape)


def verify(
    spec: Spec,
    forward: Callable[[Tree], jax.Array],
    abstract: Tree,
    *,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> None:
    """Checks that random permutations don't change the output of a model with random parameters.

    Args:
        spec: to be checked.
        forward: from a tree to the output; it is jitted.
        abstract: the tree's shapes and dtypes.
        seed: of the parameters and the permutations.
        tolerance: largest difference of an output, as a part of the largest output.

    Raises:
        UserError: the output changes. It names the group, and the leaf if there is one without
            which the group would be right.
    """
    missing = [name for name in spec.leaves if name not in flatten(abstract)]
    if missing:
        raise UserError(f"the permutations name {missing[0]!r}, which the model has not")
    run = jax.jit(forward)
    tree = _random_tree(abstract, seed)
    expected = np.asarray(run(tree), np.float32)

    def changes(spec: Spec, groups: Sequence[str]) -> bool:
        moved = np.asarray(run(apply(spec, draw(spec, seed + 1, groups), tree)), np.float32)
        return not np.abs(moved - expected).max() <= tolerance * np.abs(expected).max()

    if not changes(spec, spec.permuted()):
        return
    for group in spec.permuted():
        related = [g for g in spec.permuted() if g == group or group in spec.groups[g].given]
        if not changes(spec, [group]):
            continue
        for leaf in spec.users(group):
            if not changes(without(spec, leaf, related), [group]):
                raise UserError(
                    f"permuting {group!r} changes what the model computes: {leaf!r} should not be "
                    "permuted with it"
                )
        raise UserError(
            f"permuting {group!r} changes what the model computes: a parameter is missing among "
            f"its leaves {', '.join(spec.users(group))}"
        )
    raise UserError("permuting all groups at once changes what the model computes")


def without(spec: Spec, leaf: str, groups: Sequence[str]) -> Spec:
    """Returns a spec in which some groups no longer permute a leaf."""
    dims = tuple(
        tuple(Factor("", f.size) if f.group in groups else f for f in dim)
        for dim in spec.leaves[leaf]
    )
    return spec._replace(leaves={**spec.leaves, leaf: dims})


def _random_tree(abstract: Tree, seed: int) -> Tree:
    """Returns numbers for parameters that no symmetry distinguishes: none is 0 or 1 as at a start.

    Matrices have the size of a usual initialisation, vectors (scales, variances) are positive.
    """
    flat = {}
    for number, (name, leaf) in enumerate(flatten(abstract).items()):
        rng = np.random.default_rng([seed, number])
        if leaf.ndim < 2:
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            columns = leaf.shape[-1]
            values = rng.standard_normal(leaf.shape) / max(1, leaf.size // columns) ** 0.5
        flat[name] = values.astype(leaf.dtype)
    return unflatten(flat, abstract)
