"""Gradient episodic memory: no step against the gradient of any earlier experience."""

from typing import Any

import jax
import jax.numpy as jnp

from lamina.platform.incremental import checks
from lamina.platform.incremental import memory as memories
from lamina.platform.training.learners import Learner, Moment, Own, Setup

ITERATIONS = 50
"""Sweeps over the dual's coordinates: exact to float32 as long as the rows of G aren't nearly
parallel; at cosines of 0.99 the projected gradient is off by some percent."""


def gem(*, per_task: int = 100, strength: float = 0.5) -> Learner:
    """Projects the gradient on `{g': G g' >= 0}`, rows of G the gradients of earlier experiences.

    Lopez-Paz and Ranzato (2017, arXiv 1706.08840). If any G_k . g < 0, then `g' = g + G'v` with v
    the solution of `min 1/2 v'GG'v + (Gg)'v, v >= strength`. The lower bound, which pushes the
    step towards the past, is the authors' code; the paper adds it to the solution for v >= 0. A
    multiple of the unit matrix (1e-3) is added to GG' as in the code. The dual, as small as
    the number of experiences, is solved by a fixed number of coordinate descents.

    Args:
        per_task: rows that are kept of each experience; each G_k is from all of them.
        strength: gamma. Default 0.5: the authors'.

    Raises:
        UserError: there are no rows, or the strength is negative.
    """
    checks.within(1, per_task=per_task)
    checks.within(0, strength=strength)
    kept = memories.create(0, policy="task", past_only=True, per_task=per_task)

    def init(setup: Setup) -> Own:
        # Its length tells the number of experiences where only the state is at hand.
        return {"experiences": jnp.arange(setup.space.experiences, dtype=jnp.int32)}

    def gradient(gradient: Any, own: Own, params: Any, of: Any, moment: Moment, memory: Own) -> Any:
        count = len(own["experiences"])
        past = own["experiences"] < moment.experience
        like = jax.tree.map(lambda p: jnp.zeros((count, *p.shape), p.dtype), params)

        def fill(number: jax.Array, rows_of_g: Any) -> Any:
            eligible = (memory["priority"] < memories.EMPTY) & (memory["task"] == number)
            rows, there = memories.take(memory, per_task, eligible, moment.key)
            new = of(rows | {"weights": there.astype(jnp.float32)})
            return jax.tree.map(lambda all_, one: all_.at[number].set(one), rows_of_g, new)

        rows_of_g = jax.lax.fori_loop(0, moment.experience, fill, like)
        pairs = zip(jax.tree.leaves(rows_of_g), jax.tree.leaves(gradient), strict=True)
        dots, gram = jnp.zeros(count), 1e-3 * jnp.eye(count)
        for rows, leaf in pairs:
            flat = rows.reshape(count, -1)
            dots, gram = dots + flat @ leaf.reshape(-1), gram + flat @ flat.T
        v = dual(gram, dots, past, own["strength"])
        violated = jnp.any((dots < 0) & past)
        v = jnp.where(violated & past, v, 0.0)
        return jax.tree.map(lambda g, r: g + jnp.tensordot(v, r, axes=1), gradient, rows_of_g)

    return Learner(
        init=init,
        gradient=gradient,
        memory=kept,
        hyper={"strength": strength},
        needs=frozenset({"boundaries"}),
    )


def dual(gram: jax.Array, dots: jax.Array, there: jax.Array, bound: jax.Array) -> jax.Array:
    """Returns the v >= bound that minimises `1/2 v'Pv + q'v`; 0 where `there` is False.

    Args:
        gram: P, positive definite, float32 [E, E].
        dots: q, [E].
        there: bool [E]: which entries take part.
        bound: lower bound of the entries.
    """

    def coordinate(k: jax.Array, v: jax.Array) -> jax.Array:
        rest = dots[k] + gram[k] @ v - gram[k, k] * v[k]
        new = jnp.maximum(-rest / gram[k, k], bound)
        return v.at[k].set(jnp.where(there[k], new, 0.0))

    def sweep(_: jax.Array, v: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, len(dots), coordinate, v)

    start = jnp.where(there, bound, 0.0)
    return jax.lax.fori_loop(0, ITERATIONS, sweep, start)
