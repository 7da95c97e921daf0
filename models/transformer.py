"""Decoder-only transformers for tokens, in the manner of LLaMA (Touvron et al. 2023, 2302.13971).

Pre-norm blocks with RMSNorm, rotary positions, grouped-query attention and a SwiGLU MLP, without
biases. Letters: B batch, T time, D embed, H heads, G key and value heads, K units of a head,
V vocabulary, L layers, S places of the cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models import axes
from lamina.models.attention import attend, attend_cached
from lamina.models.layers import Dense, normal
from lamina.models.ngrams import ABSENT, NgramEmbedding
from lamina.models.norms import RMSNorm
from lamina.models.placement import BATCH, LENGTH, STREAM, constrain
from lamina.models.spec import DataSpec, Output, require_sizes
from lamina.models.stack import Stack


class Sizes(NamedTuple):
    """Sizes of a decoder."""

    depth: int
    embed: int
    heads: int
    kv_heads: int
    mlp: int


#: small to xl have the widths of GPT-2 (Radford et al. 2019), with SwiGLU units of 8/3 embed
#: (Shazeer 2020, 2002.05202) rounded to 64; llama3-8b: Grattafiori et al. 2024, table 3.
PRESETS = {
    "nano": Sizes(4, 128, 4, 4, 384),
    "micro": Sizes(6, 256, 4, 2, 704),
    "mini": Sizes(8, 512, 8, 4, 1408),
    "small": Sizes(12, 768, 12, 12, 2048),
    "medium": Sizes(24, 1024, 16, 16, 2752),
    "large": Sizes(36, 1280, 20, 20, 3456),
    "xl": Sizes(48, 1600, 25, 25, 4288),
    "llama3-8b": Sizes(32, 4096, 32, 8, 14336),
}
#: Standard deviation of embeddings at the start (Radford et al. 2019).
EMBEDDING_STD = 0.02


class Cache(NamedTuple):
    """What decoding keeps of the tokens it has seen.

    Attributes:
        keys: ``[L, B, S, G, K]``, rotated.
        values: ``[L, B, S, G, K]``.
        length: int32 scalar: places filled.
        tokens: int32 ``[B, P]``: the last tokens, for n-gram embeddings (P may be 0).
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    tokens: jax.Array


class Block(nnx.Module):
    """A pre-norm decoder block."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        sizes: Sizes,
        dtype: jnp.dtype,
        dropout: float,
        attention: str,
        norm_epsilon: float,
    ):
        embed, heads, groups, mlp = sizes[1:]
        units = embed // heads
        residual = 1 / (2 * sizes.depth)

        def project(count: int, name: str) -> Dense:
            names = (axes.EMBED, name, axes.HEAD_DIM)
            return Dense(rngs, (embed,), (count, units), names, dtype, bias=False)

        self.attention_norm = RMSNorm(rngs, embed, dtype, norm_epsilon)
        self.query = project(heads, axes.HEADS)
        self.key = project(groups, axes.KV_HEADS)
        self.value = project(groups, axes.KV_HEADS)
        names = (axes.HEADS, axes.HEAD_DIM, axes.EMBED)
        self.output = Dense(
            rngs, (heads, units), (embed,), names, dtype, scale=residual, bias=False
        )
        self.mlp_norm = RMSNorm(rngs, embed, dtype, norm_epsilon)
        self.gate = Dense(rngs, (embed,), (mlp,), (axes.EMBED, axes.MLP), dtype, bias=False)
        self.up = Dense(rngs, (embed,), (mlp,), (axes.EMBED, axes.MLP), dtype, bias=False)
        self.down = Dense(
            rngs, (mlp,), (embed,), (axes.MLP, axes.EMBED), dtype, scale=residual, bias=False
        )
        self.dropout = nnx.Dropout(dropout)
        self.attention = attention

    def __call__(
        self,
        x_BTD: jax.Array,
        rngs: nnx.Rngs | None,
        angles: jax.Array,
        segments: jax.Array | None,
        start: jax.Array | None,
        cached: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array | tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Maps ``[B, T, D]`` to the same; with a cache also returns the new keys and values."""
        x = constrain(self.attention_norm(x_BTD), BATCH, LENGTH, None)
        query = constrain(rotate(self.query(x), angles), BATCH, LENGTH, axes.HEADS, None)
        key = constrain(rotate(self.key(x), angles), BATCH, None, axes.KV_HEADS, None)
        value = constrain(self.value(x), BATCH, None, axes.KV_HEADS, None)
        if cached is None or start is None:
            x = attend(
                query,
                key,
                value,
                causal=True,
                segments_BT=segments,
                implementation=self.attention,
            )
        else:
            write = jax.lax.dynamic_update_slice_in_dim
            cached = (write(cached[0], key, start, axis=1), write(cached[1], value, start, axis=1))
            x = attend_cached(query, *cached, start)
        x = constrain(x, BATCH, LENGTH, axes.HEADS, None)
        x = constrain(self.output(x), BATCH, STREAM, None, summed=axes.HEADS)
        x_BTD = x_BTD + self.dropout(x, rngs=rngs)
        x = constrain(self.mlp_norm(x_BTD), BATCH, LENGTH, None)
        x = constrain(jax.nn.silu(self.gate(x)) * self.up(x), BATCH, LENGTH, axes.MLP)
        x = constrain(self.down(x), BATCH, STREAM, None, summed=axes.MLP)
        x_BTD = x_BTD + self.dropout(x, rngs=rngs)
        return x_BTD if cached is None else (x_BTD, cached)


class Transformer(nnx.Module):
    """Embedding, a stack of decoder blocks, a norm and the logits; see ``transformer``."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        vocabulary: int,
        dtype: jnp.dtype,
        sizes: Sizes,
        tied: bool,
        rope_theta: float,
        embedding_scale: float,
        norm_epsilon: float,
        dropout: float,
        scan: bool,
        remat: str,
        attention: str,
        ngram_orders: tuple[int, ...],
        ngram_buckets: int,
    ):
        self.sizes, self.dtype, self.tied, self.rope_theta = sizes, dtype, tied, rope_theta
        self.embedding_scale = embedding_scale
        table = normal(EMBEDDING_STD, axes.VOCAB, axes.EMBED)
        self.embedding = nnx.Param(table(rngs.params(), (vocabulary, sizes.embed), jnp.float32))
        self.orders = tuple(ngram_orders)
        if self.orders:
            self.ngrams = NgramEmbedding(
                rngs, self.orders, ngram_buckets, sizes.embed, EMBEDDING_STD
            )
        self.dropout = nnx.Dropout(dropout)
        make = lambda keys: Block(keys, sizes, dtype, dropout, attention, norm_epsilon)
        self.layers = Stack(rngs, make, sizes.depth, scan=scan, remat=remat)
        self.norm = RMSNorm(rngs, sizes.embed, dtype, norm_epsilon)
        if not tied:
            names = axes.VOCAB, axes.EMBED
            unembedding = normal(EMBEDDING_STD, *names)
            shape = (vocabulary, sizes.embed)
            self.unembedding = nnx.Param(unembedding(rngs.params(), shape, jnp.float32))

    def __call__(
        self,
        inputs: jax.Array,
        *,
        rngs: nnx.Rngs | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Output | tuple[Output, Cache]:
        """Computes the logits of the next token at each place.

        Args:
            inputs: int32 ``[B, T]``.
            rngs: for dropout.
            segments: int32 ``[B, T]``: places see only their own segment. Default: None.
            positions: int32 ``[B, T]``. Default: None, counted from the first place.
            cache: of the tokens before; then there are no segments. Default: None.

        Returns:
            Output with logits ``[B, T, V]``, and the new cache if one was given.

        Raises:
            ValueError: a cache together with segments.
        """
        if cache is not None and segments is not None:
            raise ValueError("decoding with a cache takes one text per row: no segments")
        start = None if cache is None else cache.length
        if positions is None:
            positions = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
            positions = positions if start is None else positions + start
        history = self._history(inputs, cache)
        x_BTD = self._embed(inputs, history, segments)
        x_BTD = constrain(x_BTD, BATCH, LENGTH, None, summed=axes.VOCAB)
        x_BTD = self.dropout(constrain(x_BTD, BATCH, STREAM, None), rngs=rngs)
        units = self.sizes.embed // self.sizes.heads
        angles = rope_angles(positions, units, self.rope_theta)
        per_layer = None if cache is None else (cache.keys, cache.values)
        result = self.layers(x_BTD, angles, segments, start, rngs=rngs, per_layer=per_layer)
        x_BTD = result if cache is None else result[0]
        features = constrain(self.norm(x_BTD), BATCH, LENGTH, None)
        table = (self.embedding if self.tied else self.unembedding)[...].astype(self.dtype)
        logits = jnp.einsum("BTD,VD->BTV", features, table, preferred_element_type=jnp.float32)
        output = Output(constrain(logits, BATCH, LENGTH, axes.VOCAB), features)
        if cache is None:
            return output
        seen = jnp.concatenate([history, inputs], axis=1)[:, inputs.shape[1] :]
        keys, values = result[1]
        return output, Cache(keys, values, cache.length + inputs.shape[1], seen)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Returns a cache with ``length`` places for each of ``batch`` texts."""
        sizes = self.sizes
        shape = (sizes.depth, batch, length, sizes.kv_heads, sizes.embed // sizes.heads)
        zeros = jnp.zeros(shape, self.dtype)
        tokens = jnp.full((batch, self._before()), ABSENT, jnp.int32)
        return Cache(zeros, zeros, jnp.zeros((), jnp.int32), tokens)

    def _before(self) -> int:
        return self.ngrams.history if self.orders else 0

    def _history(self, inputs: jax.Array, cache: Cache | None) -> jax.Array:
        if cache is not None:
            return cache.tokens
        return jnp.full((inputs.shape[0], self._before()), ABSENT, jnp.int32)

    def _embed(
        self, inputs: jax.Array, history: jax.Array, segments: jax.Array | None
    ) -> jax.Array:
        """Embeds tokens and n-grams, times the embedding's scale.

        The sum of N orders is divided by sqrt(N + 1), which keeps its variance; the paper of the
        n-grams divides by N + 1.
        """
        x_BTD = self.embedding[...][inputs]
        if self.orders:
            x_BTD = x_BTD + self.ngrams(inputs, history, segments)
            x_BTD = x_BTD / (len(self.orders) + 1) ** 0.5
        return (x_BTD * self.embedding_scale).astype(self.dtype)


def rope_angles(positions_BT: jax.Array, units: int, theta: float) -> jax.Array:
    """Returns the rotation angles ``[B, T, 1, K / 2]`` (Su et al. 2021, arXiv 2104.09864)."""
    rates = theta ** (-jnp.arange(0, units, 2, dtype=jnp.float32) / units)
    return (positions_BT.astype(jnp.float32)[..., None] * rates[None, None])[:, :, None]


def rotate(x_BTHK: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (k, k + K / 2) of every head by ``angles``, in float32."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHK.dtype)


def transformer(
    rngs: nnx.Rngs,
    spec: DataSpec,
    dtype: jnp.dtype,
    *,
    preset: str = "nano",
    depth: int = 0,
    embed: int = 0,
    heads: int = 0,
    kv_heads: int = 0,
    mlp: int = 0,
    tied: bool = True,
    rope_theta: float = 10000.0,
    embedding_scale: float = 0.0,
    norm_epsilon: float = 1e-6,
    dropout: float = 0.0,
    scan: bool = True,
    remat: str = "none",
    attention: str = "auto",
    ngram_orders: tuple[int, ...] = (),
    ngram_buckets: int = 16384,
) -> Transformer:
    """Builds a decoder.

    Kernels start with variance 1 / fan-in (LeCun et al. 1998), those that write to the residual
    stream with 1 / (2 depth) of it, and embeddings with deviation 0.02 (both Radford et al. 2019).
    Embeddings are multiplied by sqrt(embed) (Vaswani et al. 2017, section 3.4).

    Args:
        rngs: random streams.
        spec: the data; int32 tokens, ``outputs`` is the size of the vocabulary.
        dtype: compute dtype.
        preset: "nano", "micro", "mini", "small", "medium", "large", "xl" or "llama3-8b".
            Default: "nano" (0.9 million parameters for bytes).
        depth: number of blocks; 0 takes the preset's.
        embed: width; 0 takes the preset's.
        heads: query heads; 0 takes the preset's.
        kv_heads: key and value heads; 0 takes the preset's, or ``heads`` if that is given.
        mlp: hidden units; 0 takes the preset's, or 8/3 ``embed``, rounded up to 64, if that is
            given.
        tied: whether the logits use the embedding's table. Default: True.
        rope_theta: base of the rotary wavelengths. Default: 10000 (Su et al. 2021); LLaMA 3 has
            500000.
        embedding_scale: factor of the embeddings; 0 takes sqrt(embed). LLaMA has 1.
        norm_epsilon: of the norms. Default: 1e-6 (LLaMA; LLaMA 2 and 3 have 1e-5).
        dropout: rate after the embedding, attention and MLP. Default: 0.
        scan: whether the blocks are stacked and run by a scan. Default: True.
        remat: what the backward pass computes again, see ``lamina.models.stack``. Default: "none".
        attention: see ``lamina.models.attention``. Default: "auto".
        ngram_orders: lengths of hashed n-grams that are embedded too, as (3, 4, 5), see
            ``lamina.models.ngrams``. Default: none.
        ngram_buckets: rows of the table of each order. Default: 16384.

    Raises:
        ValueError: no tokens, or sizes that don't fit each other.

    Example:
        >>> spec = DataSpec((16,), "int32", 256)
        >>> model = transformer(nnx.Rngs(0), spec, jnp.float32, depth=1, embed=16, heads=2)
        >>> model(jnp.zeros((1, 16), jnp.int32)).logits.shape
        (1, 16, 256)
    """
    if spec.input_dtype != "int32" or len(spec.input_shape) != 1:
        raise ValueError(
            f"transformer needs int32 tokens of shape (T,), but one example is "
            f"{spec.input_dtype}{tuple(spec.input_shape)}. For images use vit or convnet."
        )
    if preset not in PRESETS:
        raise ValueError(f"unknown transformer preset {preset!r}; it may be one of {[*PRESETS]}")
    base = PRESETS[preset]
    sizes = Sizes(
        depth=depth or base.depth,
        embed=embed or base.embed,
        heads=heads or base.heads,
        kv_heads=kv_heads or heads or base.kv_heads,
        mlp=mlp or (-(-8 * embed // 192) * 64 if embed else base.mlp),
    )
    require_sizes(dropout, **sizes._asdict())
    if sizes.embed % sizes.heads or sizes.embed // sizes.heads % 2:
        raise ValueError(
            f"embed={sizes.embed} must be an even multiple of heads={sizes.heads}: "
            "rotary positions turn pairs of units"
        )
    if sizes.heads % sizes.kv_heads:
        raise ValueError(f"kv_heads={sizes.kv_heads} must divide heads={sizes.heads}")
    return Transformer(
        rngs,
        spec.outputs,
        dtype,
        sizes,
        tied,
        rope_theta,
        embedding_scale or sizes.embed**0.5,
        norm_epsilon,
        dropout,
        scan,
        remat,
        attention,
        tuple(ngram_orders),
        ngram_buckets,
    )
