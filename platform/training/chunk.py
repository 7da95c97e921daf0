"""The chunk of training steps that is dispatched at once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lamina.platform.training.seeds import Seeds
from lamina.platform.training.state import TrainState
from lamina.platform.training.step import Batch, Recipe, train_step


def train_chunk(
    recipe: Recipe,
    seeds: Seeds,
    select: Callable[[Any, Any], Batch],
    length: int,
    state: TrainState,
    constants: Any,
    rows: Any,
    span: jax.Array,
) -> tuple[TrainState, dict[str, Any]]:
    """Runs the next steps.

    The number of steps is an argument and not part of the program, so that a shorter last chunk
    runs the very same program.

    Args:
        recipe: the step's functions.
        seeds: how several seeds are run.
        select: makes a batch of the feed's constants and one row.
        length: the largest number of steps; with 1 there is no loop.
        state: of all seeds.
        constants: the feed's arrays on the devices.
        rows: for each step of a window, what the feed selects.
        span: int32 [2]: which row of the window is that of the first step, and how many steps to
            run, at most `length`.

    Returns:
        The state, and a summary for the record: the leaves of its `metrics` stacked, and its
        `nonfinite_step`.
    """
    first = state.step if seeds.lowering == "single" else state.step[0]
    fresh = first % recipe.log_every == 0
    metrics = jax.tree.map(lambda m: jnp.where(fresh, jnp.zeros_like(m), m), state.metrics)
    parts = seeds.split(dataclasses.replace(state, metrics=metrics))

    def body(i, parts):
        batch = select(constants, jax.tree.map(lambda r: r[span[0] + i], rows))
        due = (first + i + 1) % recipe.log_every == 0
        step = lambda state, batch: train_step(recipe, state, batch, due, first + i)
        return seeds.lift(step, "seed")(parts, batch)

    parts = body(0, parts) if length == 1 else jax.lax.fori_loop(0, span[1], body, parts)
    state = seeds.join(parts)
    sums = jnp.stack(jax.tree.leaves(state.metrics))  # one array: one transfer to the host
    return state, {"metrics": sums, "nonfinite_step": state.nonfinite_step}
