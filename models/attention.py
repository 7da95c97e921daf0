"""Scaled dot-product attention (Vaswani et al. 2017) in four implementations of one function.

Letters: B batch, T queries, S keys, H query heads, G key and value heads (H is a multiple of G;
Ainslie et al. 2023, arXiv 2305.13245), K units of a head.
"""

import jax
import jax.numpy as jnp

from lamina.models import placement
from lamina.models.layers import chunk_size
from lamina.models.splash import splash, suits

IMPLEMENTATIONS = ("auto", "dense", "blocked", "fused", "splash")

#: Blocks of queries in the "blocked" implementation: of a causal square of n * n blocks only
#: n (n + 1) / 2 are computed. Measured on CPU: 4 is best for 256 tokens, 2 little worse.
QUERY_BLOCKS = 4
#: Blocks smaller than this cost more in dispatch than they save.
SMALLEST_BLOCK = 32
#: Positions from which on a TPU takes the kernel; below, the logits are small.
LONG = 1024


def attend(
    query_BTHK: jax.Array,
    key_BSGK: jax.Array,
    value_BSGK: jax.Array,
    *,
    causal: bool,
    segments_BT: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Returns ``softmax(query . key / sqrt(K)) . value``; logits and softmax are float32.

    Args:
        query_BTHK: queries.
        key_BSGK: keys; S = T if causal.
        value_BSGK: values.
        causal: whether position t sees only positions up to t.
        segments_BT: int32 segment of each position (S = T); positions see only their own segment.
            Default: None, one segment.
        implementation: "dense" (all logits at once), "blocked" (plain operations in chunks that
            stay in a CPU's cache, skipping blocks that the causal mask hides; the backward pass
            computes a chunk again instead of keeping its logits), "fused"
            (``jax.nn.dot_product_attention``), "splash" (causal only: a Pallas kernel for TPU,
            see ``lamina.models.splash``), or "auto": "blocked" where the program is for a CPU,
            "splash" on TPU for causal attention over at least ``LONG`` positions, else "fused".
            Default: "auto".

    Returns:
        ``[B, T, H, K]`` in the dtype of the queries.

    Raises:
        ValueError: an unknown implementation, heads that don't divide, or "splash" for what it
            can't do.
    """
    heads, groups = query_BTHK.shape[2], key_BSGK.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} query heads are no multiple of {groups} key and value heads")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; it may be one of {IMPLEMENTATIONS}"
        )
    if implementation == "auto":
        implementation = _chosen(query_BTHK, key_BSGK, causal)
    if implementation == "splash":
        if not causal:
            raise ValueError("attention 'splash' is causal; without a mask use 'fused'")
        return splash(query_BTHK, key_BSGK, value_BSGK, segments_BT)
    if implementation == "fused":
        mask = None if segments_BT is None else _same_segment(segments_BT, segments_BT)[:, None]
        return jax.nn.dot_product_attention(
            query_BTHK, key_BSGK, value_BSGK, mask=mask, is_causal=causal
        )
    if implementation == "dense":
        return _rows(query_BTHK, key_BSGK, value_BSGK, segments_BT, 0, causal)
    return _blocked(query_BTHK, key_BSGK, value_BSGK, segments_BT, causal)


def attend_cached(
    query_BTHK: jax.Array, key_BSGK: jax.Array, value_BSGK: jax.Array, start: jax.Array
) -> jax.Array:
    """Attends causally to a cache of S places, of which the queries fill ``start`` and after.

    Args:
        query_BTHK: queries of the positions ``start`` to ``start + T - 1``.
        key_BSGK: the cache of keys; places after ``start + T - 1`` are never read.
        value_BSGK: the cache of values.
        start: int32 scalar, may be traced.

    Returns:
        ``[B, T, H, K]``.
    """
    return _rows(query_BTHK, key_BSGK, value_BSGK, None, start, True)


def _chosen(query: jax.Array, key: jax.Array, causal: bool) -> str:
    platform = placement.platform()
    if platform == "cpu":
        return "blocked"
    long = causal and query.shape[1] >= LONG and suits(query, key)
    return "splash" if platform == "tpu" and long else "fused"


def _blocked(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, causal: bool
) -> jax.Array:
    batch, length, heads, _ = query.shape
    blocks = QUERY_BLOCKS if causal else 1
    while blocks > 1 and (length % blocks or length // blocks < SMALLEST_BLOCK):
        blocks -= 1
    size = length // blocks

    def one(inputs: tuple) -> jax.Array:
        q, k, v, s = inputs
        outputs = []
        for start in range(0, length, size):
            end = start + size
            seen = end if causal else k.shape[1]
            part = None if s is None else s[:, :seen]
            outputs.append(_rows(q[:, start:end], k[:, :seen], v[:, :seen], part, start, causal))
        return jnp.concatenate(outputs, axis=1)

    inputs = (query, key, value, segments)
    chunk = chunk_size(batch, 4 * heads * length * key.shape[1])
    if chunk == batch:
        return one(inputs)
    split = jax.tree.map(lambda x: x.reshape(batch // chunk, chunk, *x.shape[1:]), inputs)
    return jax.lax.map(jax.checkpoint(one), split).reshape(query.shape)


def _rows(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    start: int | jax.Array,
    causal: bool,
) -> jax.Array:
    """Attends with queries whose first stands at position ``start`` of the keys."""
    batch, rows, heads, units = query.shape
    length, groups = key.shape[1], key.shape[2]
    # Batch and heads stay dimensions of their own: merged, a mesh that splits both would have to
    # gather the heads.
    query = (query * units**-0.5).reshape(batch, rows, groups, heads // groups, units)
    query = query.transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    logits = jax.lax.dot_general(
        query, key, (((4,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )
    mask = None
    if causal:
        mask = jnp.arange(rows)[:, None] + start >= jnp.arange(length)[None]
        mask = mask[None, None, None]
    if segments is not None:
        queries = jax.lax.dynamic_slice_in_dim(segments, start, rows, axis=1)
        same = _same_segment(queries, segments)[:, None, None]
        mask = same if mask is None else jnp.logical_and(mask, same)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    output = jax.lax.dot_general(weights, value, (((4,), (2,)), ((0, 1), (0, 1))))
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, rows, heads, units)


def _same_segment(queries_BT: jax.Array, keys_BS: jax.Array) -> jax.Array:
    return queries_BT[:, :, None] == keys_BS[:, None, :]
