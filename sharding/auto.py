"""A tensor-parallel layout for any model, from its computation: the rules `auto`.

Megatron's layouts (Shoeybi et al. 2019, 1909.08053) alternate: a matrix is split by columns, so
that each device computes a part of the hidden units, and the next one by rows, so that the partial
products need one all-reduce. Redco (Tan et al. 2023, 2310.16355) finds such pairs in any language
model from two rules over the order of its layers. Here the pairs are found in the jaxpr: which
dimensions of the parameters are one and the same (the units that one matrix makes and the next one
consumes), and for each such dimension what splitting it would cover and cost. The choice is the set
of dimensions, no two of them in one parameter, with the largest sum of

    (share of the parameters that it splits) - (share of the matrix products that it makes partial).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from lamina.sharding.dimensions import Dimensions, trace


def layout(
    apply: Callable[..., Any], params: Mapping[str, Any], arguments: tuple, ways: int, axis: str
) -> dict[str, tuple[str, ...]]:
    """Returns how to split the parameters of a model over one mesh axis.

    Args:
        apply: `(parameters, *arguments) -> outputs`, the forward pass.
        params: path to parameter, as arrays or `jax.ShapeDtypeStruct`s.
        arguments: further arguments, likewise.
        ways: the size of the mesh axis.
        axis: its name.

    Returns:
        Path to a rule for each dimension: `axis` or "". At most one dimension of a parameter is
        split, and it divides by `ways`.
    """
    if ways == 1:
        return {path: ("",) * len(leaf.shape) for path, leaf in params.items()}
    found = trace(apply, params, arguments)
    owned = {path: found.leading(path) for path in params}
    chosen = _choose(found, owned, params, ways)
    result = {}
    for path, leading in owned.items():
        split = next((i for i, atom in enumerate(leading) if atom in chosen), None)
        result[path] = tuple(axis if i == split else "" for i in range(len(leading)))
    return result


def _choose(
    found: Dimensions,
    owned: Mapping[str, list[int]],
    params: Mapping[str, Any],
    ways: int,
) -> frozenset[int]:
    """Returns the dimensions to split."""
    total = sum(math.prod(leaf.shape) for leaf in params.values()) or 1
    made = sum(size for _, size in found.products) or 1
    hidden, worth = found.hidden, dict[int, float]()
    together: dict[int, set[int]] = {}
    for path, leading in owned.items():
        atoms = {atom for atom in hidden & {*leading} if found.size(atom) % ways == 0}
        if len(leading) < 2:
            continue
        for atom in atoms:
            worth[atom] = worth.get(atom, 0.0) + math.prod(params[path].shape) / total
            together.setdefault(atom, set()).update(atoms - {atom})
    for row, size in found.products + found.reductions:
        for atom in worth.keys() & {*found.leaves(row)}:
            worth[atom] -= size / made

    @functools.cache
    def best(nodes: frozenset[int]) -> tuple[float, frozenset[int]]:
        """Returns the heaviest set of `nodes` of which no two stand in one parameter."""
        if not nodes:
            return 0.0, frozenset()
        hub = max(sorted(nodes), key=lambda n: len(together[n] & nodes))
        near = together[hub] & nodes
        without = _sum(best, _components(nodes - {hub}, together))
        if worth[hub] <= 0:
            return without
        rest = _sum(best, _components(nodes - {hub} - near, together))
        taken = (rest[0] + worth[hub], rest[1] | {hub})
        return max(taken, without, key=lambda pair: pair[0])

    return _sum(best, _components(frozenset(worth), together))[1]


def _sum(best: Callable, parts: list[frozenset[int]]) -> tuple[float, frozenset[int]]:
    found = [best(part) for part in parts]
    return sum(f[0] for f in found), frozenset().union(*(f[1] for f in found))


def _components(nodes: frozenset[int], together: Mapping[int, set[int]]) -> list[frozenset[int]]:
    parts, left = [], set(nodes)
    while left:
        part, edge = set(), {min(left)}
        while edge:
            part |= edge
            edge = {n for node in edge for n in together[node] & left} - part
        left -= part
        parts.append(frozenset(part))
    return parts
