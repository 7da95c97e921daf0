"""Weight matching: the permutation of one model's units that brings it closest to another.

Ainsworth et al. 2022 (Git Re-Basin, arXiv 2209.04836, algorithm 1): maximise the inner product of
the two models' parameters by coordinate descent, one linear assignment problem for each group of
units with the others held as they are.

Two things go beyond the paper. The first pass is anchored: a group's first assignment counts only
the parameters whose other units are matched already, or stay, so that it isn't led astray by units
still in disorder. And units that hang on others (`Group.given`) are matched with them: the value of
giving head j the place of head i is what the best order of the units inside them yields.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.checkpoints.names import flatten
from lamina.platform.errors import UserError
from lamina.platform.merging import permutations
from lamina.platform.merging.permutations import Spec, groups_of, sizes_of

Tree = Any
Found = dict[str, np.ndarray]
SWEEPS = 100
"""Sweeps over all groups at most; a few are enough."""
_GAIN = 1e-9
"""A new order is taken if it raises the inner product by more than this part of it."""
_INNER = 5
"""Rounds over the units inside a pair of heads at most; most need two."""


class Matched(NamedTuple):
    """How one model's units fit another's.

    Attributes:
        permutations: of the groups of the spec.
        before: the inner product of the two models' parameters.
        similarity: the same after permuting.
        sweeps: sweeps that the best start took.
        history: the inner product after each group of the best start, which never falls.
    """

    permutations: Found
    before: float
    similarity: float
    sweeps: int
    history: tuple[float, ...]


def match(
    spec: Spec,
    reference: Tree,
    other: Tree,
    *,
    seed: int = 0,
    restarts: int = 1,
    anchored: bool = True,
) -> Matched:
    """Returns the permutations under which `other` fits `reference` best.

    Batch statistics and the like (under `model_state/`) don't count, as in the paper; they are
    permuted with the rest by `permutations.apply(spec, matched.permutations, other)`.

    Args:
        spec: what may be permuted.
        reference: parameters.
        other: parameters of the same shapes.
        seed: of the order in which groups are visited.
        restarts: how many starts, of which the best counts. Default: 1.
        anchored: whether the first start's first pass is anchored (see the module's docstring);
            other starts visit groups at random from the beginning, as the paper has it.

    Raises:
        UserError: a parameter is missing, not finite, or of another shape.
    """
    if restarts < 1:
        raise UserError(f"restarts = {restarts} should be 1 or more")
    pairs = _pairs(spec, reference, other)
    results = []
    for start in range(restarts):
        rng = np.random.default_rng([seed, start])
        results.append(_descend(_Problem(spec, pairs), rng, anchored and start == 0))
    best = max(results, key=lambda result: result.similarity)
    before = _Problem(spec, pairs).similarity(permutations.identity(spec))
    return best._replace(before=before)


def align(spec: Spec, reference: Tree, other: Tree, *, seed: int = 0, restarts: int = 1) -> Tree:
    """Returns `other` with its units permuted to fit `reference`; see `match`."""
    found = match(spec, reference, other, seed=seed, restarts=restarts)
    return permutations.apply(spec, found.permutations, other)


def settle(spec: Spec, models: Sequence[Tree], *, rounds: int, seed: int = 0) -> list[Tree]:
    """Matches each model but the first to the mean of the others, until none moves.

    Args:
        spec: what may be permuted.
        models: three or more, matched roughly.
        rounds: at most.
        seed: of the matchings.
    """
    found = list(models)
    for _ in range(rounds):
        moved = False
        for number in range(1, len(found)):
            others = [model for i, model in enumerate(found) if i != number]
            target = jax.tree.map(_mean, *others)
            matched = match(spec, target, found[number], seed=seed, anchored=False)
            if _moves(spec, matched.permutations):
                found[number] = permutations.apply(spec, matched.permutations, found[number])
                moved = True
        if not moved:
            break
    return found


def _pairs(spec: Spec, reference: Tree, other: Tree) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the parameters that count, from both models, on the host in float32."""
    sides = []
    for side, tree in (("the reference", reference), ("the other model", other)):
        flat, found = flatten(tree), {}
        for name, dims in spec.leaves.items():
            if name.startswith("model_state/"):
                continue
            if name not in flat:
                raise UserError(f"{side} has no {name!r}, which the permutations move")
            value = np.asarray(jax.device_get(flat[name]))
            if value.size != np.prod(sizes_of(dims)):
                raise UserError(f"{name!r} has shape {value.shape} in {side}: it doesn't fit")
            if not np.isfinite(value.astype(np.float32)).all():
                raise UserError(f"{name!r} of {side} has NaN or infinite numbers")
            found[name] = value.astype(np.float64 if value.dtype == np.float64 else np.float32)
        sides.append(found)
    return {name: (value, sides[1][name]) for name, value in sides[0].items()}


class _Block(NamedTuple):
    """What one parameter says of a group: inner products, for each batch index.

    `table` is `[batch, i, *c, j, *d]`: unit i of the reference against unit j of the other, and
    inside them the units c and d of the groups `inner`.
    """

    table: np.ndarray
    inner: tuple[str, ...]


class _Problem(NamedTuple):
    """Two models and what may be permuted."""

    spec: Spec
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]

    def inner(self, group: str) -> list[str]:
        """Returns the groups that hang on the place in this one."""
        return [name for name in self.spec.permuted() if group in self.spec.groups[name].given]

    def outer(self) -> list[str]:
        """Returns the groups that hang on none that is permuted: those that are visited."""
        groups = self.spec.groups
        free = lambda name: not any(groups[given].permuted for given in groups[name].given)
        return [name for name in self.spec.permuted() if free(name)]

    def similarity(self, found: Found) -> float:
        """Returns the inner product of the reference with the permuted other model."""
        return sum(
            float(np.vdot(one, permutations.permute(self.spec, found, name, two)))
            for name, (one, two) in self.pairs.items()
        )

    def others(self, leaf: str, group: str) -> set[str]:
        """Returns the permuted groups of a leaf besides one and what hangs on it."""
        own = {group, *self.inner(group), ""}
        found = set(groups_of(self.spec.leaves[leaf])) - own
        return {name for name in found if self.spec.groups[name].permuted}

    def blocks(self, group: str, found: Found, leaves: Sequence[str]) -> list[_Block]:
        """Returns what the leaves say of a group while the others stay as they are found."""
        inner, blocks = self.inner(group), []
        for leaf in leaves:
            names = groups_of(self.spec.leaves[leaf])
            held = [name for name in inner if name in names]
            if any(names.count(name) > 1 for name in held):
                continue  # units that meet each other inside a pair: left to the final comparison
            for place, name in enumerate(names):
                if name == group:
                    blocks.append(self._block(group, found, leaf, place, held))
        return blocks

    def _block(self, group: str, found: Found, leaf: str, place: int, held: list[str]) -> _Block:
        dims = self.spec.leaves[leaf]
        names, sizes = groups_of(dims), sizes_of(dims)
        places = [place, *(names.index(name) for name in held)]
        fixed = self.spec.groups[group].given
        batch = [names.index(name) for name in fixed]
        rest = [i for i in range(len(sizes)) if i not in (*places, *batch)]
        one, two = self.pairs[leaf]
        two = permutations.permute(self.spec, found, leaf, two, raw=places)
        rows = [sizes[i] for i in places]
        count = int(np.prod([sizes[i] for i in batch]))

        def matrices(value: np.ndarray) -> np.ndarray:
            turned = value.reshape(sizes).transpose([*batch, *places, *rest])
            return turned.reshape(count, int(np.prod(rows)), -1)

        table = matrices(one) @ matrices(two).transpose(0, 2, 1)
        return _Block(table.reshape(count, *rows, *rows), tuple(held))


def _descend(problem: _Problem, rng: np.random.Generator, anchored: bool) -> Matched:
    """Visits groups until none gains."""
    spec, found = problem.spec, permutations.identity(problem.spec)
    outer = problem.outer()
    if anchored:
        _anchor(problem, found, outer)
        current = problem.similarity(found)
        start = problem.similarity(permutations.identity(spec))
        if current < start:  # nothing to hold on to: as the paper begins
            found, current = permutations.identity(spec), start
    else:
        current = problem.similarity(found)
    history, sweeps, gained = [current], 0, True
    while gained and sweeps < SWEEPS:
        sweeps, gained = sweeps + 1, False
        for number in rng.permutation(len(outer)):
            group = outer[number]
            leaves = [leaf for leaf in problem.pairs if leaf in spec.users(group)]
            changed = _assign(problem, group, found, leaves)
            if all((changed[name] == found[name]).all() for name in changed):
                continue
            reached = problem.similarity({**found, **changed})
            if reached > current + _GAIN * abs(current):
                found, current, gained = {**found, **changed}, reached, True
                history.append(current)
    return Matched(found, 0.0, current, sweeps, tuple(history))


def _anchor(problem: _Problem, found: Found, outer: Sequence[str]) -> None:
    """Matches each group once, in `found`: always the one that has most to hold on to."""
    spec, left = problem.spec, list(outer)
    users = {group: [leaf for leaf in spec.users(group) if leaf in problem.pairs] for group in left}
    while left:
        waiting = {*left, *(name for group in left for name in problem.inner(group))}
        usable = {
            group: [leaf for leaf in users[group] if not problem.others(leaf, group) & waiting]
            for group in left
        }
        weight = {
            group: sum(problem.pairs[leaf][0].size for leaf in usable[group])
            / spec.groups[group].size
            for group in left
        }
        group = max(left, key=lambda group: weight[group])
        found.update(_assign(problem, group, found, usable[group] or users[group]))
        left.remove(group)


def _assign(problem: _Problem, group: str, found: Found, leaves: Sequence[str]) -> Found:
    """Returns the best order of a group's units, and of those inside them, the others as found."""
    spec = problem.spec
    inner, size = problem.inner(group), spec.groups[group].size
    blocks = problem.blocks(group, found, leaves)
    result = {name: found[name].copy() for name in (group, *inner)}
    if not blocks:
        return result
    start = {name: np.arange(spec.groups[name].size) for name in inner}
    flat = result[group].reshape(-1, size)  # [batch, place]
    within = {name: result[name].reshape(len(flat), size, -1) for name in inner}
    for batch in range(len(flat)):
        value = np.zeros((size, size))
        nested = []
        for block in blocks:
            if block.inner:
                nested.append((block.table[batch], block.inner))
            else:
                value += block.table[batch]
        orders = {}
        for i, j in np.ndindex(value.shape) if inner else ():
            gain, orders[i, j] = _inside(nested, start, i, j)
            value[i, j] += gain
        flat[batch] = _best_columns(value)
        for i, j in enumerate(flat[batch]):
            for name in inner:
                within[name][batch, i] = orders[i, j][name]
    return result


def _best_columns(value: np.ndarray) -> np.ndarray:
    """Returns for each row the column that it gets, so that the sum of the values is largest."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and few programs need it

    return linear_sum_assignment(value, maximize=True)[1]


def _inside(
    blocks: Sequence[tuple[np.ndarray, tuple[str, ...]]],
    start: Mapping[str, np.ndarray],
    i: int,
    j: int,
) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the best inner product of unit i with unit j, and the order of what is inside j."""
    pieces = [(table[(i, *[slice(None)] * len(names), j)], names) for table, names in blocks]
    orders = dict(start)
    settled: set[str] = set()
    total = -np.inf
    for _ in range(_INNER):
        for name in orders:
            value = np.zeros((orders[name].size, orders[name].size))
            for table, names in pieces:
                # At first only what needs no other order, if there is such.
                if name in names and (len(names) == 1 or settled >= set(names) - {name}):
                    value += _seen(table, names, name, orders)
            orders[name] = _best_columns(value)
            settled.add(name)
        before, total = total, sum(_seen_all(table, names, orders) for table, names in pieces)
        if total <= before:
            break
    return total, orders


def _seen(
    table: np.ndarray, names: Sequence[str], name: str, orders: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns `[c, d]` of one group, with the other groups of a table in their orders."""
    count = len(names)
    for place in reversed(range(count)):
        if names[place] == name:
            continue
        order = orders[names[place]]
        # Axes move: the pair of this group is taken together and added up.
        rows = np.arange(order.size)
        moved = np.moveaxis(table, (place, count + place), (0, 1))
        table = moved[rows, order].sum(0)
        names = [*names[:place], *names[place + 1 :]]
        count -= 1
    return table


def _seen_all(table: np.ndarray, names: Sequence[str], orders: Mapping[str, np.ndarray]) -> float:
    matrix = _seen(table, names, names[0], orders)
    return float(matrix[np.arange(len(matrix)), orders[names[0]]].sum())


def _mean(*leaves: Any) -> Any:
    if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        return leaves[0]
    return sum(np.asarray(leaf, np.float32) for leaf in leaves) / np.float32(len(leaves))


def _moves(spec: Spec, found: permutations.Permutations) -> bool:
    still = permutations.identity(spec)
    return any((found[name] != still[name]).any() for name in spec.permuted())
