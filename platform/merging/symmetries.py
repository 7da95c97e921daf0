"""The permutation symmetries of a model, derived from its logical axes and its program.

The logical axes say which dimensions have an order that means something (classes, tokens, places,
pixels) and name the others; how these hang together, so that all that one permutation moves moves,
is read off the program (`tracing`). Hence this holds for any model: residual streams are shared by
all that writes to them, heads move as blocks with query groups and units inside them where nothing
as rotary positions forbids it, channels before a group norm stay in groups, the hidden units of
a scanned stack have a permutation for each layer, and tied parameters one for all their uses.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lamina.models import axes as logical
from lamina.models.functional import FunctionalModel
from lamina.models.spec import DataSpec
from lamina.platform.checkpoints.names import flatten, unflatten
from lamina.platform.merging import tracing
from lamina.platform.merging.dimensions import Atom, expand, fix, root
from lamina.platform.merging.permutations import Factor, Group, Spec, verify

Tree = Any
STATE = "model_state"
"""Where a tree has batch statistics and the like."""
IN_ORDER = frozenset(
    {
        logical.VOCAB,
        logical.CLASSES,
        logical.POSITION,
        logical.PATCH,
        logical.KERNEL_H,
        logical.KERNEL_W,
        logical.LAYERS,
    }
)
"""Logical axes whose order means something."""


class Symmetries(NamedTuple):
    """A model and what may be permuted in it.

    Attributes:
        spec: the groups of units and their leaves.
        forward: from a tree (see `joined`) to the logits of an example.
        abstract: the shapes and dtypes of such a tree.
    """

    spec: Spec
    forward: Callable[[Tree], jax.Array]
    abstract: Tree


def joined(params: Tree, model_state: Tree) -> Tree:
    """Returns parameters and other state as one tree, as specs name them."""
    return {**params, STATE: model_state} if model_state else dict(params)


def separate(tree: Tree) -> tuple[Tree, Tree]:
    """Undoes `joined`."""
    return {k: v for k, v in tree.items() if k != STATE}, tree.get(STATE, {})


def derive(model: FunctionalModel, data: DataSpec, *, check: bool = True) -> Symmetries:
    """Returns the permutation symmetries of a model.

    They are sound, not always complete: an operation that isn't known fixes the units it touches.

    Args:
        model: in evaluation mode.
        data: what its inputs are.
        check: whether to try random permutations of random parameters. Default: True.

    Raises:
        UserError: the check finds that the output changes.
    """
    example = example_inputs(data)
    abstract = joined(model.params, model.model_state)
    flat = flatten(abstract)
    names = {**dict.fromkeys(flat, None), **_axes(model.axes)}

    def forward(tree: Tree, inputs: jax.Array = example) -> jax.Array:
        params, model_state = separate(tree)
        return model.apply(params, model_state, inputs, train=False)[0].logits

    def function(*arrays: jax.Array) -> jax.Array:
        *leaves, inputs = arrays
        tree = unflatten(dict(zip(flat, leaves, strict=True)), abstract)
        return forward(tree, inputs)

    inputs = [(leaf, _free(names[name], leaf.ndim)) for name, leaf in flat.items()]
    inputs.append((jax.ShapeDtypeStruct(example.shape, example.dtype), (False,) * example.ndim))
    found = tracing.trace(function, inputs)
    fix(dim for label in found.outputs for dim in label)
    labels = dict(zip(flat, found.inputs[:-1], strict=True))
    symmetries = Symmetries(_spec(labels, names, found.arrays), forward, abstract)
    if check:
        verify(symmetries.spec, forward, abstract)
    return symmetries


def example_inputs(data: DataSpec, batch: int = 2, seed: int = 0) -> jax.Array:
    """Returns random inputs: tokens, or numbers between 0 and 1."""
    key, shape = jax.random.key(seed), (batch, *data.input_shape)
    if jnp.issubdtype(data.input_dtype, jnp.integer) and len(data.input_shape) == 1:
        return jax.random.randint(key, shape, 0, data.outputs, jnp.int32)
    return jax.random.uniform(key, shape, jnp.float32)


def _axes(tree: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[str | None, ...]]:
    found = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _axes(value, f"{name}/") if isinstance(value, dict) else {name: value}
    return found


def _free(names: tuple[str | None, ...] | None, ndim: int) -> tuple[bool, ...]:
    return tuple(name not in IN_ORDER for name in names or (None,) * ndim)


def _spec(labels: Mapping[str, Any], names: Mapping[str, Any], arrays: Sequence[Any]) -> Spec:
    """Returns the groups that a trace has found, and which may depend on the place in which."""
    leaves: dict[str, tuple[tuple[Atom, ...], ...]] = {
        leaf: tuple(tuple(f for f in expand(dim) if isinstance(f, Atom)) for dim in label)
        for leaf, label in labels.items()
    }
    atoms: dict[Atom, str] = {}
    for leaf, dims in leaves.items():
        called = [name or "units" for name in names[leaf] or (None,) * len(dims)]
        for place, dim in enumerate(dims):
            which = str(place) if called.count(called[place]) > 1 else ""
            for number, atom in enumerate(dim):
                suffix = f".{number}" if len(dim) > 1 else ""
                atoms.setdefault(atom, f"{leaf}:{called[place]}{which}{suffix}")
    given = _given(atoms, arrays)
    needed = {a: None for parents in given.values() for a in parents if a.fixed}
    order = [*needed, *(a for a in given if not given[a]), *(a for a in given if given[a])]
    # Those that have a permuted parent come after it.
    order.sort(key=lambda a: (a in given, any(not p.fixed for p in given.get(a, ()))))
    groups = {
        atoms[a]: Group(a.size, tuple(atoms[p] for p in given.get(a, ())), a in given)
        for a in dict.fromkeys(order)
    }
    factors = {
        leaf: tuple(
            tuple(Factor(atoms[a] if atoms[a] in groups else "", a.size) for a in dim)
            for dim in dims
        )
        for leaf, dims in leaves.items()
        if any(atom in given for dim in dims for atom in dim)
    }
    return Spec(groups, factors)


def _given(atoms: Mapping[Atom, str], arrays: Sequence[Any]) -> dict[Atom, list[Atom]]:
    """Returns for each atom that is permuted those on whose place its permutation may depend.

    b may have a permutation of its own for each place in a where each array that has b has a, so
    that nothing ever adds up over a alone or compares two places in a; and where no array has a
    twice, so that it is always clear which a is meant.
    """
    known = set(atoms)
    contents: dict[Atom, list[Counter[Atom]]] = {atom: [] for atom in atoms}
    seen = set()
    for factors, outer in arrays:
        held = [f for f in (*expand(factors), *expand(outer)) if isinstance(f, Atom)]
        kept = tuple(sorted((root(f) for f in held if root(f) in known), key=id))
        if kept in seen:
            continue
        seen.add(kept)
        for atom, counted in ((atom, Counter(kept)) for atom in set(kept)):
            contents[atom].append(counted)
    once = {a for a in atoms if all(counted[a] == 1 for counted in contents[a])}
    free = [a for a in atoms if not a.fixed]
    order = {atom: number for number, atom in enumerate(atoms)}

    def always_with(b: Atom, a: Atom) -> bool:
        return a is not b and a in once and all(counted[a] for counted in contents[b])

    def follows(b: Atom, a: Atom) -> bool:
        """Of two that always go together, the later depends on the earlier."""
        return always_with(b, a) and (order[a] < order[b] or not always_with(a, b))

    result = {b: [a for a in atoms if a.fixed and always_with(b, a)] for b in free}
    outer = [b for b in free if not any(follows(b, a) for a in free)]
    for b in free:
        for parent in [a for a in outer if follows(b, a)][:1]:
            # What stays is the same for both, so that they can be matched together.
            result[b] = [a for a in result[b] if a in result[parent]] + [parent]
    return result


def count(spec: Spec) -> float:
    """Returns the natural logarithm of the number of permutations."""
    total = 0.0
    for name in spec.permuted():
        *given, size = spec.shape(name)
        total += math.prod(given) * math.lgamma(size + 1)
    return total
