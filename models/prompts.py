"""A pool of prompts from which each example takes some: the trained part of a frozen model."""

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models import axes
from lamina.models.layers import normal


class PromptPool(nnx.Module):
    """Prompts with keys; an example takes those whose keys are most like its query.

    Wang et al. (2022, arXiv 2112.08654), chosen for each example and not for a batch. Prompts and
    keys start with deviation 0.02.

    Args:
        rngs: random streams.
        number: prompts in the pool.
        length: tokens of a prompt.
        chosen: prompts that an example takes.
        embed: D, size of a token and of a query.
        dtype: compute dtype.

    Raises:
        ValueError: sizes below 1, or more prompts chosen than there are.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        number: int,
        length: int,
        chosen: int,
        embed: int,
        dtype: jnp.dtype,
    ):
        if length < 1 or not 1 <= chosen <= number:
            raise ValueError(
                f"prompt_length={length} must be at least 1, and prompts_chosen={chosen} between 1 "
                f"and prompts={number}"
            )
        self.chosen, self.dtype = chosen, dtype
        prompt, key = normal(0.02, None, axes.POSITION, axes.EMBED), normal(0.02, None, axes.EMBED)
        self.prompts = nnx.Param(prompt(rngs.params(), (number, length, embed), jnp.float32))
        self.keys = nnx.Param(key(rngs.params(), (number, embed), jnp.float32))

    def __call__(self, query_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the chosen prompts' tokens [B, chosen * length, D], and the similarity [B].

        The similarity is the sum of the cosines between the query and the keys of the chosen
        prompts, to be pulled up by whoever trains them; no gradient goes to the query.
        """
        unit = lambda x: x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))
        query = unit(jax.lax.stop_gradient(query_BD).astype(jnp.float32))
        cosines_BM = query @ unit(self.keys[...]).T
        best_BK, places_BK = jax.lax.top_k(cosines_BM, self.chosen)
        tokens = self.prompts[...][places_BK].astype(self.dtype)
        return tokens.reshape(len(query), -1, query.shape[-1]), best_BK.sum(-1)
