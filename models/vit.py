"""Vision transformers (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models import axes
from lamina.models.attention import attend
from lamina.models.layers import Dense, head, normal
from lamina.models.norms import LayerNorm
from lamina.models.placement import BATCH, LENGTH, STREAM, constrain
from lamina.models.prompts import PromptPool
from lamina.models.spec import DataSpec, Output, require_image, require_sizes
from lamina.models.stack import Stack

#: depth, embed, heads (Dosovitskiy et al. 2021, table 1; ti and s: Touvron et al. 2021, table 1).
PRESETS = {
    "ti": (12, 192, 3),
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
}

ACTIVATIONS = {
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu": partial(jax.nn.gelu, approximate=False),
}


class Block(nnx.Module):
    """A pre-norm encoder block: self-attention, then a GELU MLP."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        embed: int,
        heads: int,
        mlp: int,
        dtype: jnp.dtype,
        dropout: float,
        activation: str,
        norm_epsilon: float,
    ):
        into = ((embed,), (heads, embed // heads), (axes.EMBED, axes.HEADS, axes.HEAD_DIM), dtype)
        self.attention_norm = LayerNorm(rngs, embed, dtype, norm_epsilon)
        self.query = Dense(rngs, *into, init="xavier")
        self.key = Dense(rngs, *into, init="xavier")
        self.value = Dense(rngs, *into, init="xavier")
        self.output = Dense(
            rngs,
            (heads, embed // heads),
            (embed,),
            (axes.HEADS, axes.HEAD_DIM, axes.EMBED),
            dtype,
            init="xavier",
        )
        self.mlp_norm = LayerNorm(rngs, embed, dtype, norm_epsilon)
        self.up = Dense(rngs, (embed,), (mlp,), (axes.EMBED, axes.MLP), dtype, init="xavier")
        self.down = Dense(rngs, (mlp,), (embed,), (axes.MLP, axes.EMBED), dtype, init="xavier")
        self.dropout, self.activation = nnx.Dropout(dropout), ACTIVATIONS[activation]

    def __call__(self, x_BTD: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Maps ``[B, T, D]`` to the same."""
        x = constrain(self.attention_norm(x_BTD), BATCH, LENGTH, None)
        query = constrain(self.query(x), BATCH, LENGTH, axes.HEADS, None)
        key = constrain(self.key(x), BATCH, None, axes.HEADS, None)
        value = constrain(self.value(x), BATCH, None, axes.HEADS, None)
        x = attend(query, key, value, causal=False)
        x = constrain(x, BATCH, LENGTH, axes.HEADS, None)
        x = constrain(self.output(x), BATCH, STREAM, None, summed=axes.HEADS)
        x_BTD = x_BTD + self.dropout(x, rngs=rngs)
        x = constrain(self.mlp_norm(x_BTD), BATCH, LENGTH, None)
        x = constrain(self.activation(self.up(x)), BATCH, LENGTH, axes.MLP)
        x = self.down(self.dropout(x, rngs=rngs))
        x = constrain(x, BATCH, STREAM, None, summed=axes.MLP)
        return x_BTD + self.dropout(x, rngs=rngs)


class ViT(nnx.Module):
    """Patches, a stack of encoder blocks, pooling and a head; see ``vit``."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        spec: DataSpec,
        dtype: jnp.dtype,
        sizes: tuple[int, int, int, int],
        patch: int,
        pool: str,
        activation: str,
        norm_epsilon: float,
        dropout: float,
        scan: bool,
        remat: str,
        pool_of_prompts: tuple[int, int, int],
    ):
        height, width, channels = require_image(spec, "vit")
        depth, embed, heads, mlp = sizes
        self.patch, self.pool, self.dtype = patch, pool, dtype
        pixels = patch * patch * channels
        self.embed = Dense(
            rngs, (pixels,), (embed,), (axes.PATCH, axes.EMBED), dtype, init="fan_in"
        )
        tokens = (height // patch) * (width // patch) + (pool == "token")
        position = normal(0.02, axes.POSITION, axes.EMBED)
        self.position = nnx.Param(position(rngs.params(), (tokens, embed), jnp.float32))
        if pool == "token":
            zeros = axes.annotate(nnx.initializers.zeros_init(), axes.EMBED)
            self.token = nnx.Param(zeros(rngs.params(), (embed,), jnp.float32))
        self.dropout = nnx.Dropout(dropout)
        make = lambda keys: Block(keys, embed, heads, mlp, dtype, dropout, activation, norm_epsilon)
        self.layers = Stack(rngs, make, depth, scan=scan, remat=remat)
        self.norm = LayerNorm(rngs, embed, dtype, norm_epsilon)
        self.head = head(rngs, embed, spec.outputs, dtype, init="zeros")
        chosen = (*pool_of_prompts, embed, dtype)
        self.prompts = PromptPool(rngs, *chosen) if pool_of_prompts[0] else None

    def __call__(self, inputs: jax.Array, *, rngs: nnx.Rngs | None = None) -> Output:
        """Maps ``[B, H, W, C]`` to logits ``[B, outputs]``."""
        x_BTD = constrain(self.embed(patchify(inputs, self.patch)), BATCH, LENGTH, None)
        if self.pool == "token":
            token = jnp.broadcast_to(
                self.token[...].astype(self.dtype)[None, None], (x_BTD.shape[0], 1, x_BTD.shape[2])
            )
            x_BTD = jnp.concatenate([token, x_BTD], axis=1)
        x_BTD = x_BTD + self.position[...].astype(self.dtype)[None]
        if self.prompts is None:
            features, similarity = self.pooled(self.encode(x_BTD, rngs)), None
        else:
            tokens, similarity = self.prompts(self.pooled(self.encode(x_BTD, rngs)))
            x_BTD = self.encode(jnp.concatenate([tokens, x_BTD], axis=1), rngs)
            features = mean(x_BTD[:, : tokens.shape[1]])
        features = constrain(features, BATCH, None)
        logits = constrain(self.head(features), BATCH, None).astype(jnp.float32)
        return Output(logits, features, similarity)

    def encode(self, x_BTD: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Maps tokens ``[B, T, D]`` to the last layer's."""
        x_BTD = self.dropout(constrain(x_BTD, BATCH, STREAM, None), rngs=rngs)
        return self.norm(self.layers(x_BTD, rngs=rngs))

    def pooled(self, x_BTD: jax.Array) -> jax.Array:
        """Returns one vector for each example, ``[B, D]``."""
        return x_BTD[:, 0] if self.pool == "token" else mean(x_BTD)


def mean(x_BTD: jax.Array) -> jax.Array:
    """Returns the mean over tokens, added up in float32."""
    return x_BTD.mean(1, dtype=jnp.float32).astype(x_BTD.dtype)


def patchify(images_BHWC: jax.Array, patch: int) -> jax.Array:
    """Cuts images into patches in reading order: ``[B, T, patch * patch * C]``."""
    batch, height, width, channels = images_BHWC.shape
    rows, columns = height // patch, width // patch
    x = images_BHWC.reshape(batch, rows, patch, columns, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, rows * columns, patch * patch * channels)


def vit(
    rngs: nnx.Rngs,
    spec: DataSpec,
    dtype: jnp.dtype,
    *,
    preset: str = "s",
    patch: int = 16,
    depth: int = 0,
    embed: int = 0,
    heads: int = 0,
    mlp: int = 0,
    pool: str = "token",
    activation: str = "gelu_tanh",
    norm_epsilon: float = 1e-6,
    dropout: float = 0.0,
    scan: bool = True,
    remat: str = "none",
    prompts: int = 0,
    prompt_length: int = 5,
    prompts_chosen: int = 5,
) -> ViT:
    """Builds a vision transformer.

    Kernels start after Glorot & Bengio 2010, positions with deviation 0.02 and the head at zero,
    as in the authors' code.

    Args:
        rngs: random streams.
        spec: the data; images only.
        dtype: compute dtype.
        preset: "ti", "s", "b" or "l". Default: "s".
        patch: rows and columns of a patch, in pixels. Default: 16.
        depth: number of blocks; 0 takes the preset's.
        embed: width; 0 takes the preset's.
        heads: 0 takes the preset's.
        mlp: hidden units; 0 takes 4 ``embed``.
        pool: "token" (a class token) or "gap" (the mean of all patches). Default: "token".
        activation: "gelu_tanh" (the tanh approximation, as in the authors' code) or "gelu" (exact,
            as in PyTorch's). Default: "gelu_tanh".
        norm_epsilon: of the norms. Default: 1e-6, as in the authors' code; Hugging Face has 1e-12.
        dropout: rate after embedding, attention and both MLP layers. Default: 0.
        scan: whether the blocks are stacked and run by a scan. Default: True.
        remat: what the backward pass computes again, see ``lamina.models.stack``. Default: "none".
        prompts: prompts in a pool from which each example takes some by its features without them
            (Wang et al. 2022, arXiv 2112.08654); they stand before its tokens, and the head sees
            their mean. Default: 0, no pool.
        prompt_length: tokens of a prompt. Default: 5, the paper's.
        prompts_chosen: prompts that an example takes. Default: 5, the paper's.

    Raises:
        ValueError: the examples are no images, or sizes that don't fit each other.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown vit preset {preset!r}; it may be one of {sorted(PRESETS)}")
    if pool not in ("token", "gap"):
        raise ValueError(f"unknown pool {pool!r}; it may be 'token' or 'gap'")
    height, width, _ = require_image(spec, "vit")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; it may be one of {[*ACTIVATIONS]}")
    require_sizes(dropout, patch=patch)
    if height % patch or width % patch:
        fitting = [p for p in range(1, min(height, width) + 1) if not (height % p or width % p)]
        raise ValueError(
            f"patch={patch} does not divide images of {height}x{width}; these do: {fitting}"
        )
    depth, embed, heads = (
        given or default
        for given, default in zip((depth, embed, heads), PRESETS[preset], strict=True)
    )
    require_sizes(dropout, depth=depth, embed=embed, heads=heads, mlp=mlp or 4 * embed)
    if embed % heads:
        raise ValueError(f"heads={heads} must divide embed={embed}")
    sizes = (depth, embed, heads, mlp or 4 * embed)
    if prompts and dropout:
        raise ValueError("a pool of prompts is chosen by features without dropout: set dropout=0")
    numbers = (prompts, prompt_length, prompts_chosen)
    options = (patch, pool, activation, norm_epsilon, dropout, scan, remat, numbers)
    return ViT(rngs, spec, dtype, sizes, *options)
