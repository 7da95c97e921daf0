"""Sampling text from a decoder: one compiled program, a scan over a key and value cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models.transformer import Transformer


def generate(
    model: Transformer,
    prompt_BT: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    temperature: float = 1.0,
    top_k: int = 0,
) -> jax.Array:
    """Continues each prompt by ``steps`` tokens.

    Args:
        model: a decoder in eval mode, as ``FunctionalModel.bind`` returns it.
        prompt_BT: int32 prompts of one length, at least 1.
        key: random key.
        steps: tokens to add.
        temperature: divides the logits; 0 takes the most likely token. Default: 1.
        top_k: samples from the k most likely tokens; 0 from all. Default: 0.

    Returns:
        int32 ``[B, T + steps]``: the prompts and their continuations. Compiled once for each
        shape, ``steps`` and ``top_k``.

    Raises:
        ValueError: an empty prompt, or a negative option.
    """
    if prompt_BT.ndim != 2 or prompt_BT.shape[1] == 0:
        raise ValueError(
            f"the prompt has shape {prompt_BT.shape}; generate needs [batch, time], and at least "
            "one token, as a newline"
        )
    if steps < 1 or temperature < 0 or top_k < 0:
        raise ValueError(
            f"steps={steps} must be at least 1, temperature={temperature} and top_k={top_k} "
            "at least 0"
        )
    graph, state = nnx.split(model)
    return _generate(graph, state, prompt_BT, key, temperature, steps=steps, top_k=top_k)


@functools.partial(jax.jit, static_argnames=("graph", "steps", "top_k"))
def _generate(
    graph: Any,
    state: Any,
    prompt: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    *,
    steps: int,
    top_k: int,
) -> jax.Array:
    def sample(logits: jax.Array, key: jax.Array) -> jax.Array:
        return _sample(logits, key, temperature, top_k).astype(prompt.dtype)

    model = nnx.merge(graph, state)
    batch, length = prompt.shape
    output, cache = model(prompt, cache=model.empty_cache(batch, length + steps))
    keys = jax.random.split(key, steps)
    first = sample(output.logits[:, -1], keys[0])

    def advance(carry: tuple, key: jax.Array) -> tuple:
        token, cache = carry
        output, cache = nnx.merge(graph, state)(token[:, None], cache=cache)
        token = sample(output.logits[:, 0], key)
        return (token, cache), token

    _, rest = jax.lax.scan(advance, (first, cache), keys[1:])
    return jnp.concatenate([prompt, first[:, None], rest.T], axis=1)


def _sample(logits_BV: jax.Array, key: jax.Array, temperature: jax.Array, top_k: int) -> jax.Array:
    if 0 < top_k < logits_BV.shape[-1]:
        smallest = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= smallest, logits_BV, -jnp.inf)
    drawn = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, logits_BV.argmax(-1))
