"""Parameters seen as matrices, by their logical axes: for methods such as SOAP and Muon.

`[embed, heads, head_dim]` is a matrix of `embed` rows, `[kernel_h, kernel_w, conv_in, conv_out]`
one of `conv_out` columns, and a leading `layers` axis is a stack of matrices.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lamina.models.axes import matrix_split

Axes = Mapping[str, tuple[str | None, ...]]
"""Path (`a/b/kernel`) to the logical axes of that parameter."""


class View(NamedTuple):
    """How an array is seen as a matrix, or as a stack of matrices.

    Attributes:
        shape: of the array.
        first: dimensions before it are the stack.
        middle: dimensions from `first` up to it are the rows, the others the columns.
    """

    shape: tuple[int, ...]
    first: int
    middle: int

    @property
    def rows(self) -> int:
        """Returns the number of rows."""
        return math.prod(self.shape[self.first : self.middle])

    @property
    def columns(self) -> int:
        """Returns the number of columns."""
        return math.prod(self.shape[self.middle :])

    @property
    def stack(self) -> tuple[int, ...]:
        """Returns the dimensions of the stack: none, or one."""
        return self.shape[: self.first]

    def matrix(self, array: jax.Array) -> jax.Array:
        """Returns `[*stack, rows, columns]`."""
        return array.reshape(*self.stack, self.rows, self.columns)

    def lift(self, function: Callable) -> Callable:
        """Returns a function of matrices as one of stacks of them."""
        return jax.vmap(function) if self.first else function


def path_names(tree: Any) -> Any:
    """Returns the tree with the path of each leaf, `a/b/kernel`, in its place."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )


def view(name: str, shape: tuple[int, ...], axes: Axes | None) -> View | None:
    """Returns how a parameter is seen as a matrix, or None for vectors and scalars.

    Args:
        name: its path.
        shape: its shape.
        axes: logical axes; of a parameter that they lack, all dimensions but the last are rows.
    """
    names = tuple((axes or {}).get(name) or ())
    if len(names) != len(shape):
        names = (None,) * len(shape)
    try:
        first, middle = matrix_split(names)
    except ValueError:
        return None
    return View(tuple(shape), first, middle)
