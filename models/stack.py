"""A stack of equal blocks: under a scan with stacked parameters, or one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models import axes, placement

REMAT = ("none", "full", "dots")


class Stack(nnx.Module):
    """Runs ``depth`` equal blocks, ``x = block(x, rngs, *shared)``.

    With ``scan`` the parameters of all blocks are stacked, with the logical axis ``layers`` first:
    the compiler sees one block, and a state has few leaves. Without, block ``i`` has its own
    parameters under ``blocks/i``. Both start from the same numbers and compute the same function.

    Args:
        rngs: random streams.
        make: builds a block.
        depth: number of blocks.
        scan: whether to stack.
        remat: what the backward pass computes again instead of keeping: "none", "full" (all but
            the input of each block; Chen et al. 2016) or "dots" (all but matrix products without
            a batch dimension). The policy doesn't change the numbers.

    Raises:
        ValueError: an unknown policy, or no block.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        make: Callable[[nnx.Rngs], nnx.Module],
        depth: int,
        *,
        scan: bool,
        remat: str,
    ):
        if remat not in REMAT:
            raise ValueError(f"unknown remat {remat!r}; it may be one of {REMAT}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        self.depth, self.scan, self.remat = depth, scan, remat
        keys = jax.random.split(rngs.params(), depth)
        if scan:
            self.blocks = nnx.vmap(lambda key: make(nnx.Rngs(key)))(keys)
            axes.add_layers_axis(self.blocks)
        else:
            self.blocks = nnx.List(make(nnx.Rngs(keys[i])) for i in range(depth))

    def __call__(
        self,
        x: jax.Array,
        *shared: Any,
        rngs: nnx.Rngs | None = None,
        per_layer: Any = None,
    ) -> Any:
        """Runs the blocks.

        Args:
            x: the input of the first block.
            *shared: handed to every block.
            rngs: for dropout; each block gets its own key.
            per_layer: a pytree whose leaves have ``depth`` first: block i gets its part as the
                last argument and returns ``(x, part)``. Default: None.

        Returns:
            x, or (x, the new ``per_layer``).
        """
        keys = None if rngs is None else jax.random.split(rngs.dropout(), self.depth)

        def run(graph: Any, state: Any, x: Any, key: Any, part: Any, shared: Any) -> Any:
            block = nnx.merge(graph, state)
            streams = None if key is None else nnx.Rngs(key)
            if x.ndim == 3:
                x = placement.constrain(x, placement.BATCH, placement.STREAM, None)
            if per_layer is None:
                return block(x, streams, *shared), None
            return block(x, streams, *shared, part)

        if self.remat != "none":
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = dots if self.remat == "dots" else None
            run = jax.checkpoint(run, policy=policy, static_argnums=0, prevent_cse=not self.scan)
        if self.scan:
            graph, state = nnx.split(self.blocks)
            x, parts = jax.lax.scan(
                lambda x, each: run(graph, each[0], x, each[1], each[2], shared),
                x,
                (state, keys, per_layer),
            )
        else:
            collected = []
            blocks: Any = self.blocks
            for i, block in enumerate(blocks):
                graph, state = nnx.split(block)
                key = None if keys is None else keys[i]
                x, part = run(graph, state, x, key, _part(per_layer, i), shared)
                collected.append(part)
            parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)
        return x if per_layer is None else (x, parts)


def _part(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree)
