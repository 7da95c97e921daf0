"""Hashed n-gram embeddings of tokens (Pagnoni et al. 2024, Byte Latent Transformer, 2412.09871).

Each token also looks up the hashes of the n-grams that end in it, one table per order n. For bytes
this buys much of what a tokenizer would, for one gather per order. Letters: B batch, T time, N
orders, D width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models import axes
from lamina.models.layers import normal

#: Odd multiplier of the rolling polynomial hash, modulo 2**32 (Knuth, volume 3, section 6.4).
MULTIPLIER = 2654435761
#: Marks places where there is no token.
ABSENT = -1


class NgramEmbedding(nnx.Module):
    """Sums the embeddings of the hashed n-grams that end in each token.

    Args:
        rngs: random streams.
        orders: the lengths n; (3, 4, 5, 6, 7, 8) in the paper.
        buckets: rows of each order's table. Collisions are not resolved.
        embed: D.
        std: standard deviation at the start.

    Raises:
        ValueError: orders below 2, repeated orders, or no buckets.
    """

    def __init__(
        self, rngs: nnx.Rngs, orders: tuple[int, ...], buckets: int, embed: int, std: float
    ):
        if min(orders) < 2 or len(set(orders)) < len(orders):
            raise ValueError(f"ngram_orders must be different numbers from 2 on, not {orders}")
        if buckets < 1:
            raise ValueError(f"ngram_orders={orders} need ngram_buckets, as 16384; got {buckets}")
        self.orders, self.buckets = tuple(orders), buckets
        make = normal(std, axes.VOCAB, axes.EMBED)
        self.table = nnx.Param(make(rngs.params(), (len(orders) * buckets, embed), jnp.float32))

    @property
    def history(self) -> int:
        """How many earlier tokens the embedding of a token depends on."""
        return max(self.orders) - 1

    def __call__(
        self, tokens_BT: jax.Array, history_BP: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        """Embeds tokens.

        Args:
            tokens_BT: the tokens.
            history_BP: the ``history`` tokens before them, ``ABSENT`` where there are none.
            segments_BT: no n-gram crosses a border of segments. Default: None, one segment.

        Returns:
            ``[B, T, D]`` float32; n-grams that would begin before the text give zero.
        """
        ids_BTN, whole_BTN = hash_ngrams(
            tokens_BT, history_BP, segments_BT, self.orders, self.buckets
        )
        found_BTND = self.table[...][ids_BTN]
        return jnp.where(whole_BTN[..., None], found_BTND, 0).sum(2)


def hash_ngrams(
    tokens_BT: jax.Array,
    history_BP: jax.Array,
    segments_BT: jax.Array | None,
    orders: tuple[int, ...],
    buckets: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns (row in the joint table, whether the n-gram is whole), both ``[B, T, N]``."""
    batch, length = tokens_BT.shape
    before = history_BP.shape[1]
    tokens = jnp.concatenate([history_BP, tokens_BT], axis=1)
    if segments_BT is None:
        segments_BT = jnp.zeros((batch, length), jnp.int32)
    first = jnp.broadcast_to(segments_BT[:, :1], (batch, before))
    segments = jnp.concatenate([first, segments_BT], axis=1)
    code = jnp.zeros((batch, length), jnp.uint32)
    whole = jnp.ones((batch, length), bool)
    ids, wholes = [], []
    for back in range(max(orders)):
        window = slice(before - back, before - back + length)
        token = tokens[:, window]
        code = code * jnp.uint32(MULTIPLIER) + (token + 1).astype(jnp.uint32)
        whole = whole & (token != ABSENT) & (segments[:, window] == segments_BT)
        if back + 1 in orders:
            mixed = (code ^ (code >> 15)) * jnp.uint32(MULTIPLIER)
            bucket = ((mixed ^ (mixed >> 13)) % jnp.uint32(buckets)).astype(jnp.int32)
            ids.append(bucket + orders.index(back + 1) * buckets)
            wholes.append(whole)
    return jnp.stack(ids, axis=-1), jnp.stack(wholes, axis=-1)
