"""Which dimensions of the arrays of a program must be permuted alike: labels that are unified.

The label of an array has one entry for each dimension: a tuple of factors, the outermost first,
whose sizes multiply to the dimension's. A factor is an `Atom`, or a plain number: that many equal
entries, which fit any permutation. A dimension of size 1 has no factors.
"""

import math
from collections.abc import Iterable, Sequence


class Atom:
    """A set of units that is permuted as one, or stays."""

    def __init__(self, size: int, fixed: bool = False):
        self.size, self.fixed = size, fixed
        self.same: Atom | None = None  # what it was unified with
        self.parts: tuple[Atom, Atom] | None = None  # what it was split into


Dim = tuple[Atom | int, ...]
Label = tuple[Dim, ...]


def new(size: int, fixed: bool = False) -> Dim:
    """Returns a dimension of units of its own."""
    return () if size == 1 else (Atom(size, fixed),)


def equal(size: int) -> Dim:
    """Returns a dimension along which all entries are equal."""
    return () if size == 1 else (size,)


def root(atom: Atom) -> Atom:
    """Returns the atom that stands for all that were unified with this one."""
    while atom.same is not None:
        atom = atom.same
    return atom


def expand(dim: Iterable[Atom | int]) -> Dim:
    """Returns a dimension in atoms that aren't split any further."""
    found: list[Atom | int] = []
    for factor in dim:
        if isinstance(factor, int):
            found.append(factor)
            continue
        atom = root(factor)
        found.extend(expand(atom.parts) if atom.parts else (atom,))
    return tuple(found)


def size_of(factor: Atom | int) -> int:
    """Returns how many units a factor has."""
    return factor if isinstance(factor, int) else factor.size


def fix(dims: Iterable[Dim]) -> None:
    """Marks dimensions whose order matters."""
    for dim in dims:
        for factor in expand(dim):
            if isinstance(factor, Atom):
                factor.fixed = True


def unify(one: Dim, other: Dim) -> Dim:
    """Makes two dimensions be permuted alike, and returns the result.

    They have one size, or one of them has size 1 and is repeated.
    """
    left, right = list(expand(one)), list(expand(other))
    if not left or not right:
        return tuple(left or right)
    joined: list[Atom | int] = []
    while left and right:
        a, b = left.pop(0), right.pop(0)
        # Uniting earlier factors may have split or joined what stands here.
        (a, *left), (b, *right) = [*expand((a,)), *left], [*expand((b,)), *right]
        if size_of(a) > size_of(b):
            parts = _split(a, size_of(b))
            a, left = parts[0], [*parts[1:], *left]
        elif size_of(b) > size_of(a):
            parts = _split(b, size_of(a))
            b, right = parts[0], [*parts[1:], *right]
        if size_of(a) != size_of(b):
            fix([one, other])
            return new(math.prod(map(size_of, expand(one))), fixed=True)
        joined.append(_join(a, b))
    return tuple(joined)


def reshape(label: Label, shape: Sequence[int]) -> Label:
    """Returns the label of an array of another shape with the same entries in the same order."""
    factors = [factor for dim in label for factor in expand(dim)]
    result: list[Dim] = []
    for size in shape:
        wanted, got = size, []
        while wanted > 1 and factors:
            factor = factors.pop(0)
            if isinstance(factor, Atom) and (root(factor) is not factor or factor.parts):
                factors = [*expand((factor,)), *factors]
                continue
            if size_of(factor) > wanted:
                parts = _split(factor, wanted)
                factor, factors = parts[0], [*parts[1:], *factors]
            if wanted % size_of(factor):
                fix(label)
                return tuple(new(each, fixed=True) for each in shape)
            got.append(factor)
            wanted //= size_of(factor)
        result.append(tuple(got))
    return tuple(result)


def _split(factor: Atom | int, outer: int) -> list[Atom | int]:
    """Returns a factor as `outer` times the rest; unchanged if it doesn't divide."""
    inner, rest = divmod(size_of(factor), outer)
    if rest or outer == 1:
        return [factor]
    if isinstance(factor, int):
        return [outer, inner]
    factor.parts = Atom(outer, factor.fixed), Atom(inner, factor.fixed)
    return [*factor.parts]


def _join(a: Atom | int, b: Atom | int) -> Atom | int:
    if isinstance(a, int):
        return b
    if isinstance(b, int) or a is b:
        return a
    b.same = a
    a.fixed = a.fixed or b.fixed
    return a
