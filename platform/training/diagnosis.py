"""Finds where a loss that is not finite comes from, by training to that step once more."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.checkpoints.store import Store
from lamina.platform.errors import UserError
from lamina.platform.training import compiled, initial, layout, learners, loop, rows, seeds, step
from lamina.platform.training import islands as archipelago
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.loading import Loaded
from lamina.platform.training.state import TrainState, step_keys
from lamina.sharding import rules as partition_rules


def explain(parts: Experiment, loaded: Loaded, store: Store, seed: int, bad_step: int) -> str:
    """Returns what first stopped being finite in step `bad_step`, and where.

    The run is replayed to that step from its newest checkpoint before it (or from the start): order
    and keys are functions of the step, so the replay computes the same numbers.

    Args:
        parts: the run's parts.
        loaded: what it started from.
        store: its checkpoints.
        seed: the value of the seed that diverged.
        bad_step: the step whose loss was not finite.

    With several processes, which each have a part of the batch, and of a stream, whose batches are
    not the feed's, it says no more than that.
    """
    if jax.process_count() > 1 or parts.recipe.space is not None:
        return f"seed {seed}: the loss of step {bad_step} is not finite"
    feed = initial.open_feed(parts)
    with contextlib.ExitStack() as stack:
        stack.callback(feed.close)
        state = _state_before(parts, loaded, store, bad_step)
        state = _replay(parts, feed, state, bad_step)
        index = parts.config.seeds.index(seed)
        one = seeds.take(state, parts.seeds.number, index)
        row = jax.tree.map(lambda r: r[0], feed.read(bad_step, 1))
        if parts.seeds.per_seed_rows:
            row = jax.tree.map(lambda r: r[index], row)
        batch = feed.select(feed.constants, jax.tree.map(jnp.asarray, row))
        if parts.recipe.islands is not None:
            return f"seed {seed}: {_on_an_island(parts, one, batch, bad_step)}"
        return f"seed {seed}: {_first_bad(parts, one, batch, bad_step)[0]}"


def _state_before(parts: Experiment, loaded: Loaded, store: Store, bad_step: int) -> TrainState:
    with contextlib.suppress(UserError):
        earlier = [s for s in store.steps() if s <= bad_step]
        if earlier:
            restored = store.restore(parts.state, max(earlier))
            if restored is not None:
                return restored.state
    return initial.create(parts, loaded)


def _replay(parts: Experiment, feed: Any, state: TrainState, stop: int) -> TrainState:
    start = int(np.ravel(jax.device_get(state.step))[0])
    if start == stop:
        return state
    length = parts.config.steps_per_call
    windows = rows.RowWindows(parts, feed, start)
    program = compiled.train_program(parts, feed, windows.abstract)
    for chunk in loop.chunks(start, stop, length, {}):
        state, _ = program.call(state, feed.constants, *windows.of(chunk))
    return state


def _on_an_island(parts: Experiment, state: TrainState, batch: Any, bad_step: int) -> str:
    """Returns the same of the first island on which something isn't finite."""
    islands, text = parts.recipe.islands, ""
    assert islands is not None
    for number in range(islands.method.number):
        own = archipelago.island(islands, state, number)
        rows = archipelago.rows_of(islands, batch, number)
        text, found = _first_bad(parts, own, rows, bad_step)
        if found:
            return f"on island {number}, {text}"
    return text


def _first_bad(parts: Experiment, state: TrainState, batch: Any, bad_step: int) -> tuple[str, bool]:
    """Returns (a sentence that names the first array that isn't finite, whether there is one)."""
    for name, array in sorted(batch.items()):
        if not _finite(array):
            text = f"step {bad_step} is given {name!r} that are not finite: look at the data"
            return text, True
    for path, leaf in sorted(layout.flat(state.params).items()):
        if not _finite(leaf):
            return (
                f"the parameter {path} was not finite before step {bad_step}: the update of the "
                "step before overflowed; lower optimizer.learning_rate, or set clip_norm"
            ), True
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer_state):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not _finite(leaf):
            where = partition_rules.path_name(path)
            return f"the optimizer's {where} was not finite before step {bad_step}", True
    _, key = step_keys(state.seed, state.step)

    def gradient_of(state: TrainState, batch: Any) -> tuple[Any, jax.Array]:
        mixed = learners.mix(parts.recipe.learner, state, batch)
        grads, _, _, loss, _ = step.gradient(parts.recipe, state, mixed, key, 1.0)
        return grads, loss

    grads, loss = jax.jit(gradient_of)(state, batch)
    bad = [path for path, leaf in sorted(layout.flat(grads).items()) if not _finite(leaf)]
    shown = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
    text = f"the loss of step {bad_step} is {float(loss)} though data and parameters were finite; "
    text += f"gradients that are not finite: {shown}" if bad else "all gradients are finite"
    return text, bool(bad) or not _finite(loss)


def _finite(array: jax.Array) -> bool:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    return bool(jnp.isfinite(array).all())
