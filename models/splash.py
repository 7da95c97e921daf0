"""Attention in a Pallas kernel on TPU: logits stay on the chip (Dao et al. 2022, arXiv 2205.14135).

The kernel is JAX's "splash attention", which also skips the blocks that the causal mask hides. The
compiler can't partition a kernel, so each device runs it on its own examples and heads.
Letters as in ``lamina.models.attention``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lamina.models import axes, placement

BLOCKS = (512, 256, 128)
"""Sizes of a block of queries or keys, of which the largest that divides the length is taken."""


def suits(query_BTHK: jax.Array, key_BSGK: jax.Array) -> bool:
    """Whether the kernel takes causal attention of these shapes."""
    length = query_BTHK.shape[1]
    return length == key_BSGK.shape[1] and length % BLOCKS[-1] == 0


def splash(
    query_BTHK: jax.Array,
    key_BSGK: jax.Array,
    value_BSGK: jax.Array,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Returns causal attention, as ``lamina.models.attention.attend`` does.

    On a CPU the kernel is interpreted, which is slow and only good for tests.

    Args:
        query_BTHK: queries.
        key_BSGK: keys, S = T.
        value_BSGK: values.
        segments_BT: int32 segment of each position. Default: None, one segment.

    Returns:
        ``[B, T, H, K]`` in the dtype of the queries.

    Raises:
        ValueError: the length is no multiple of the smallest block.
    """
    if not suits(query_BTHK, key_BSGK):
        raise ValueError(
            f"attention 'splash' takes as many queries as keys, a multiple of {BLOCKS[-1]}, not "
            f"{query_BTHK.shape[1]} and {key_BSGK.shape[1]}: use 'fused'"
        )
    if segments_BT is None:
        segments_BT = jnp.zeros(query_BTHK.shape[:2], jnp.int32)
        segmented = False
    else:
        segmented = True
    run = lambda q, k, v, s: _kernel(q, k, v, s if segmented else None)
    placed = placement.in_force()
    if placed is None or placed.mesh.size == 1:
        return run(query_BTHK, key_BSGK, value_BSGK, segments_BT)
    rows = _told(segments_BT, placement.BATCH, None)
    # Queries lie as their groups do, so that each device has the keys of its queries.
    heads = _told(key_BSGK, placement.BATCH, None, axes.KV_HEADS, None)
    return jax.shard_map(
        run,
        mesh=placed.mesh,
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )(query_BTHK, key_BSGK, value_BSGK, segments_BT)


def _told(x: jax.Array, *names: str | None) -> P:
    """Returns how the placement splits an array; what it leaves open isn't split."""
    parts = placement.partition_spec(x.shape, *names)
    return P(*(None if part is P.UNCONSTRAINED else part for part in parts))


def _kernel(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, units = query.shape[1:]
    block = next(size for size in BLOCKS if length % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = kernels.BlockSizes(**dict.fromkeys(names, block), block_kv_dkv_compute=block)
    attend: Callable[..., Any] = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=placement.platform() == "cpu",
    )
    query, key, value = (x.swapaxes(1, 2) for x in (query * units**-0.5, key, value))
    if segments is None:
        output: Any = jax.vmap(attend)(query, key, value)
    else:
        pairs = kernels.SegmentIds(segments, segments)
        output = jax.vmap(attend)(query, key, value, pairs)
    return output.swapaxes(1, 2).astype(query.dtype)
