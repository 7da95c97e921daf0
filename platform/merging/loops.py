"""What a `scan` of a jaxpr carries, in every version of JAX."""

from typing import Any


def scan_sizes(equation: Any) -> tuple[int, int]:
    """Returns how many inputs of a scan are constants, and how many are carried.

    The parameters that say so changed with JAX 0.12; the shapes always tell: what a loop runs over,
    and what it stacks, has one dimension more outside of the body.
    """
    inner = equation.params["jaxpr"]
    body = getattr(inner, "jaxpr", inner)
    rank = lambda atom: len(atom.aval.shape)
    pairs = zip(equation.outvars, body.outvars, strict=True)
    carried = sum(rank(outer) == rank(inside) for outer, inside in pairs)
    pairs = zip(equation.invars, body.invars, strict=True)
    over = sum(rank(outer) > rank(inside) for outer, inside in pairs)
    return len(equation.invars) - carried - over, carried
