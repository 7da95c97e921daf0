"""Gradient episodic memory: no step against the gradient of any earlier experience."""

from typing import Any

import jax
import jax.numpy as jnp

from lamina.platform.incremental import checks
from lamina.platform.incremental import memory as memories
from lamina.platform.linear_algebra import one_by_one
from lamina.platform.training.learners import Learner, Moment, Own, Setup

PATIENCE = 3
"""Exchanges of all entries that don't get fewer, before they go one by one: the authors'."""

EXCHANGES = 100
"""At most so many; a handful is needed, and rounding must not let the loop go on for ever."""


def gem(*, per_task: int = 100, strength: float = 0.5) -> Learner:
    """Projects the gradient on `{g': G g' >= 0}`, rows of G the gradients of earlier experiences.

    Lopez-Paz and Ranzato (2017, arXiv 1706.08840). If any G_k . g < 0, then `g' = g + G'v` with v
    the solution of `min 1/2 v'GG'v + (Gg)'v, v >= strength`. The lower bound, which pushes the
    step towards the past, is the authors' code; the paper adds it to the solution for v >= 0. A
    multiple of the unit matrix (1e-3) is added to GG' as in the code. The dual, as small as the
    number of experiences, is solved exactly.

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
        precise = jax.lax.Precision.HIGHEST
        for rows, leaf in pairs:
            flat = rows.reshape(count, -1)
            dots += jnp.dot(flat, leaf.reshape(-1), precision=precise)
            gram += jnp.dot(flat, flat.T, precision=precise)
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

    By block principal pivoting (Portugal, Judice and Vicente 1994): every entry is free or at its
    bound, the free ones are solved for exactly, and those that break a condition change sides: all
    at once as long as they get fewer, else the last one alone, which ends for a positive definite
    P. It takes a few small systems, also where the rows of G are nearly parallel, as gradients are.

    Args:
        gram: P, positive definite, float32 [E, E].
        dots: q, [E].
        there: bool [E]: which entries take part.
        bound: lower bound of the entries.
    """
    size = len(dots)
    places, eye = jnp.arange(size), jnp.eye(size, dtype=gram.dtype)
    at_bound = jnp.where(there, bound, 0.0)
    slope = dots + gram @ at_bound
    slack = jnp.finfo(gram.dtype).eps * 10 * jnp.max(jnp.abs(slope), where=there, initial=0.0)

    def solved(free: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns how far the entries are above their bound, and which are on the wrong side."""
        system = jnp.where(free[:, None] & free[None, :], gram, eye)
        above = one_by_one(jnp.linalg.solve)(system, jnp.where(free, -slope, 0.0))
        return above, there & jnp.where(free, above < 0, slope + gram @ above < -slack)

    def exchange(carry: Any) -> Any:
        free, _, wrong, fewest, patience, count = carry
        number = jnp.sum(wrong, dtype=jnp.int32)
        patience = jnp.where(number < fewest, PATIENCE, patience - 1)
        last = places == jnp.max(jnp.where(wrong, places, -1))
        free ^= wrong & ((patience >= 0) | last)
        return free, *solved(free), jnp.minimum(number, fewest), patience, count + 1

    def unsettled(carry: Any) -> jax.Array:
        return jnp.any(carry[2]) & (carry[-1] < EXCHANGES)

    free = jnp.zeros(size, bool)
    start = (free, *solved(free), jnp.int32(size + 1), jnp.int32(PATIENCE), jnp.int32(0))
    above = jax.lax.while_loop(unsettled, exchange, start)[1]
    return jnp.where(there, at_bound + jnp.maximum(above, 0.0), 0.0)
