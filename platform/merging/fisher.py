"""Fisher merging, and the diagonal Fisher information of a model that it weighs by.

Letters: N examples, C classes, T models.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lamina.platform.merging import mergers
from lamina.platform.merging.mergers import Merger
from lamina.platform.merging.method import Method

Tree = Any
Labels = Literal["sampled", "empirical", "exact"]

AT_ONCE = 16
"""Examples whose gradients are held at once: a copy of the parameters each."""


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

    def log_p(params: Tree, example: Any) -> jax.Array:
        one = logits(params, jax.tree.map(lambda leaf: leaf[None], example))[0]
        return jax.nn.log_softmax(one.astype(jnp.promote_types(one.dtype, jnp.float32)))

    def squares(example: Any, label: jax.Array, place: jax.Array) -> Tree:
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

    chunks = chunked((examples, labels, jnp.arange(number, dtype=jnp.uint32)), AT_ONCE)

    def add(total: Tree, chunk: Any) -> tuple[Tree, None]:
        each = jax.vmap(squares)(*chunk)
        return jax.tree.map(lambda t, e: t + e.sum(0), total, each), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), chunks)
    return jax.tree.map(lambda t: t / number, total)


def chunked(rows: Tree, most: int) -> Tree:
    """Returns arrays `[N, ...]` as `[N / n, n, ...]`, with the largest n up to `most`."""
    number = len(jax.tree.leaves(rows)[0])
    size = max(d for d in range(1, min(most, number) + 1) if number % d == 0)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), rows)


def merger(floor: float, normalize: bool) -> Merger:
    """Returns the merger; see `with_data.fisher`."""
    plain = Method(None, base=False)

    def apply(
        models: Sequence[Tree],
        *,
        base: Tree,
        weights: Any,
        axes: Tree,
        fishers: Sequence[Tree] = (),
    ) -> Tree:
        models, fishers = list(models), list(fishers)
        if len(fishers) != len(models):
            raise ValueError(f"needs fishers=, one tree for each of the {len(models)} models")
        leaves = mergers.fit([*models, *fishers], None, axes)
        weights = plain.weights(len(models), weights)
        chosen = [n for n in range(len(leaves.names)) if leaves.floating(n)]
        values = [leaves.models[n][: len(models)] for n in chosen]
        importance = [leaves.models[n][len(models) :] for n in chosen]
        merged = [each[0] for each in leaves.models]
        for n, value in zip(chosen, _weigh(values, importance, weights), strict=True):
            merged[n] = value
        return leaves.rebuild(merged)

    def _weigh(values: list[list[Any]], importance: list[list[Any]], weights: Any) -> list[Any]:
        work = [mergers.work_dtype([*v, *f]) for v, f in zip(values, importance, strict=True)]
        importance = [[f.astype(d) for f in each] for each, d in zip(importance, work, strict=True)]
        if normalize:
            for t in range(len(values[0]) if values else 0):
                parts = [jnp.sum(each[t] * each[t]) for each in importance]
                wide = jnp.result_type(*parts)
                norm = jnp.sqrt(sum((p.astype(wide) for p in parts), jnp.zeros((), wide)))
                scale = 1 / jnp.where(norm == 0, jnp.ones_like(norm), norm)
                for each in importance:
                    each[t] = each[t] * scale.astype(each[t].dtype)
        merged = []
        for value, each, dtype in zip(values, importance, work, strict=True):
            factors = jnp.asarray(weights, dtype)
            share = [
                jnp.maximum(f, jnp.asarray(floor, dtype)) * factors[t] for t, f in enumerate(each)
            ]
            top = sum(s * v.astype(dtype) for s, v in zip(share[1:], value[1:], strict=True))
            top = top + share[0] * value[0].astype(dtype)
            merged.append((top / sum(share[1:], share[0])).astype(value[0].dtype))
        return merged

    return Merger("fisher", apply, False, False, needs="fishers")
