"""Running several seeds in one program: along a vmapped axis, or side by side."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Lowering = Literal["single", "unroll", "vmap"]


class Seeds(NamedTuple):
    """How a function of one seed's state becomes one of all seeds' state.

    Attributes:
        number: of seeds.
        lowering: "single" has no seed axis. "unroll" writes the seeds side by side into one
            program: each computes what it would alone, bit for bit (but for matrix-vector products,
            whose rounding follows the memory's alignment), and on CPU it is as fast as `vmap` for
            dense layers and faster for convolutions, which `vmap` groups. "vmap" batches
            them, which accelerators need for speed and a sharded seed axis needs anyway.
        per_seed_rows: whether each seed has its own rows in a batch, along a leading axis.
    """

    number: int
    lowering: Lowering
    per_seed_rows: bool = False

    def split(self, tree: Any) -> tuple[Any, ...]:
        """Returns the parts that `lift` works on."""
        if self.lowering != "unroll":
            return (tree,)
        return tuple(take(tree, self.number, i) for i in range(self.number))

    def join(self, parts: tuple[Any, ...]) -> Any:
        """Returns what was split, with its seed axis."""
        if self.lowering != "unroll":
            return parts[0]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    def lift(self, function: Callable, mesh_axis: str | None = None) -> Callable:
        """Returns `function(carry, rows)` over all parts: a tuple of carries to the same.

        Args:
            function: of one seed's carry and its rows.
            mesh_axis: mesh axis along which a vmapped seed axis is split.
        """
        if self.lowering == "single":
            return lambda parts, rows: (function(parts[0], self._rows(rows, 0)),)
        if self.lowering == "unroll":
            return lambda parts, rows: tuple(
                function(part, self._rows(rows, i)) for i, part in enumerate(parts)
            )
        axes = (0, 0 if self.per_seed_rows else None)
        mapped = jax.vmap(function, in_axes=axes, spmd_axis_name=mesh_axis)
        return lambda parts, rows: (mapped(parts[0], rows),)

    def _rows(self, rows: Any, i: int) -> Any:
        return jax.tree.map(lambda a: a[i], rows) if self.per_seed_rows else rows


def plan(count: int, platform: str, seed_parallelism: int, per_seed: bool) -> Seeds:
    """Chooses the lowering for `count` seeds.

    Args:
        count: number of seeds.
        platform: "cpu", "gpu" or "tpu".
        seed_parallelism: size of the mesh's seed axis.
        per_seed: whether each seed has its own order of the data.

    Raises:
        ValueError: the seeds can't be split evenly over the seed axis.
    """
    if count % seed_parallelism:
        raise ValueError(
            f"mesh.seed = {seed_parallelism} doesn't divide the {count} seeds evenly: "
            f"use a divisor of {count}"
        )
    if count == 1:
        return Seeds(1, "single", per_seed)
    unroll = platform == "cpu" and seed_parallelism == 1
    return Seeds(count, "unroll" if unroll else "vmap", per_seed)


def take(tree: Any, count: int, i: int) -> Any:
    """Returns seed `i`'s part of a state of `count` seeds."""
    return tree if count == 1 else jax.tree.map(lambda a: a[i], tree)
