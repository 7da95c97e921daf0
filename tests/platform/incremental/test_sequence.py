"""The keys that a stream hands out."""

from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.incremental import sequence
from lamina.platform.training import learners
from lamina.platform.training.state import TrainState
from lamina.platform.training.step import Recipe

BATCHES = 5
ROWS = {
    "inputs": jnp.zeros((2, 3)),
    "labels": jnp.zeros(2, jnp.int32),
    "fresh": jnp.ones(2, bool),
    "arrives": jnp.ones(2, bool),
}


def test_a_sweep_shares_no_key_with_the_step_after_it():
    """Both are at the same step of the stream: a sweep comes after one, and before the next."""
    seen: dict[str, list[jax.Array]] = {"sweep": [], "step": []}

    def insert(memory, rows, there, moment, priority):
        seen["step"].append(moment.key)
        return memory

    def draw(memory, number, moment):
        seen["step"].append(moment.key)
        return {k: v for k, v in ROWS.items() if k not in learners.MARKS}, jnp.ones(2, bool)

    def add(carry, own, params, mixed, forward, moment):
        seen["sweep"].append(moment.key)
        return carry

    draws = {name: learners.Draw(0, labelled=True) for name in ("replay", "reference")}
    memory = learners.Memory(lambda *_: {}, insert, draw, draws, (), 2, "of a test")
    sweep = learners.Sweep(lambda *_: (), add, lambda *_: {}, batches=0)
    learner = learners.Learner(memory=memory, sweep=sweep)
    space = learners.Space(experiences=1, classes=2, tasks=1, points=1, rows=2)
    nothing = cast(Any, lambda *_: None)
    setup = learners.Setup({}, nothing, ROWS, space, jax.random.key(0))
    fields: dict[str, Any] = {name: {} for name in TrainState.__dataclass_fields__}
    own = learners.start(learner, setup)
    fields |= {"step": jnp.int32(BATCHES), "seed": jnp.uint32(0), "learner": own}
    state = TrainState(**fields)
    recipe = cast(Recipe, SimpleNamespace(learner=learner))
    for number in range(BATCHES):
        sequence.swept(recipe, (), state, ROWS, jnp.int32(number))
    mixed = learners.mix(learner, state, ROWS)
    learners.finish_step(learner, state, state, {}, mixed, ROWS, cast(Any, SimpleNamespace()))
    keys = [tuple(np.asarray(jax.random.key_data(k))) for k in seen["sweep"] + seen["step"]]
    assert len(keys) == BATCHES + 3
    assert len(set(keys)) == len(keys)
