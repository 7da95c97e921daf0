"""The diagonal Fisher information of a model, by which Fisher merging weighs it.

Letters: N examples, C classes.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Tree = Any
Labels = Literal["sampled", "empirical", "exact"]

AT_ONCE = 16
"""Gradients that are held at once: a copy of the parameters each."""


def diagonal(
    logits: Callable[[Tree, Any], jax.Array],
    params: Tree,
    examples: Any,
    labels: jax.Array,
    key: jax.Array,
    *,
    kind: Labels = "sampled",
) -> Tree:
    """Returns the diagonal of the Fisher information, `mean_x E_y (d log p(y|x) / d th)^2`.

    One gradient for each example, `AT_ONCE` at a time; it can be jitted, and the parameters may be
    sharded. A draw depends on the key and the example's number alone.

    Args:
        logits: (parameters, examples [B, ...]) to logits [B, C], or [B, T, C] of sequences, whose
            log-probabilities add up.
        params: what to differentiate by.
        examples: arrays with N first.
        labels: int32 [N] (or [N, T]), only looked at with "empirical".
        key: of the draws of "sampled".
        kind: where y comes from: "sampled" draws one from the model for each example (unbiased,
            the cheapest true Fisher), "exact" takes the expectation over all classes (C gradients
            for each example; no sequences), "empirical" takes the label (not the Fisher
            information, though often used for it).

    Returns:
        A tree like the parameters, in their dtype, not negative.
    """
    number = jax.tree.leaves(examples)[0].shape[0]
    weights = jnp.ones(number)
    total = squares(logits, params, examples, labels, weights, key, kind=kind)
    return jax.tree.map(lambda t: t / number, total)


def squares(
    logits: Callable[[Tree, Any], jax.Array],
    params: Tree,
    examples: Any,
    labels: jax.Array,
    weights: jax.Array,
    key: jax.Array,
    *,
    kind: Labels,
) -> Tree:
    """Returns `sum_x w(x) E_y (d log p(y|x) / d th)^2`, for weights w, float [N].

    The other arguments are those of `diagonal`.
    """
    number = len(weights)

    def log_p(params: Tree, example: Any) -> jax.Array:
        one = logits(params, jax.tree.map(lambda leaf: leaf[None], example))[0]
        return jax.nn.log_softmax(one.astype(jnp.promote_types(one.dtype, jnp.float32)))

    def squared(example: Any, label: jax.Array, place: jax.Array) -> Tree:
        if kind == "exact":
            values = log_p(params, example)
            slopes = jax.jacrev(log_p)(params, example)
            expect = lambda s: jnp.tensordot(jnp.exp(values).astype(s.dtype), s * s, 1)
            return jax.tree.map(expect, slopes)
        if kind == "sampled":
            drawn = jax.random.fold_in(key, place)
            label = jax.random.categorical(drawn, log_p(params, example))
        chosen = lambda p: jnp.take_along_axis(log_p(p, example), label[..., None], -1).sum()
        return jax.tree.map(lambda g: g * g, jax.grad(chosen)(params))

    most = AT_ONCE
    if kind == "exact":
        first = jax.tree.map(lambda leaf: leaf[:1], examples)
        most = max(AT_ONCE // jax.eval_shape(logits, params, first).shape[-1], 1)
    places = jnp.arange(number, dtype=jnp.uint32)
    chunks = chunked((examples, labels, places, weights), most)

    def add(total: Tree, chunk: Any) -> tuple[Tree, None]:
        *rows, weight = chunk
        each = jax.vmap(squared)(*rows)
        weigh = lambda t, e: t + jnp.tensordot(weight.astype(e.dtype), e, 1)
        return jax.tree.map(weigh, total, each), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), chunks)[0]


def chunked(rows: Tree, most: int) -> Tree:
    """Returns arrays `[N, ...]` as `[N / n, n, ...]`, with the largest n up to `most`."""
    number = len(jax.tree.leaves(rows)[0])
    size = max(d for d in range(1, min(most, number) + 1) if number % d == 0)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), rows)
