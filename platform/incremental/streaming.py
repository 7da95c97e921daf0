"""A stream whose data stay on the host: the learner of `sequence`, fed with batches by Grain.

Where the training data are too large for a device (or on disk, as `np.memmap`s), batches are read
ahead by threads or workers, and the loops over segments and batches run on the host. What is
computed, in which order and with which keys, is what `sequence.advance` computes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.data.feed import Reader
from lamina.platform.incremental import sequence, transforms
from lamina.platform.incremental.sequence import Plan, Segments, Tables
from lamina.platform.training import learners
from lamina.platform.training.state import TrainState

WINDOW = 16
"""Steps in one dispatch: the time of a dispatch is little beside theirs."""

PREFETCH = 2 * WINDOW
"""Batches that are kept ready."""

Advance = Callable[[TrainState, np.ndarray], tuple[TrainState, np.ndarray]]


class Batches:
    """The batches of a stream, one after the other, for Grain.

    Args:
        arrays: name to array [N, ...], such as `np.memmap`s.
        rows: int32 [S, B]: examples; beyond the last one, examples + N * number of the transform.
        marks: name to array [S, B] that comes with them.
    """

    def __init__(
        self, arrays: Mapping[str, np.ndarray], rows: np.ndarray, marks: Mapping[str, np.ndarray]
    ):
        self._arrays, self._rows, self._marks = dict(arrays), rows, dict(marks)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        count = len(self._arrays["labels"])
        batch = {name: array[self._rows[step] % count] for name, array in self._arrays.items()}
        marks = {name: array[step] for name, array in self._marks.items()}
        return batch | marks | {"number": self._rows[step] // count}


def open_advance(
    plan: Plan,
    shardings: TrainState,
    cut: Segments,
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
    tables: Tables,
    workers: int,
) -> tuple[Advance, Callable[[], None]]:
    """Returns what learns a part of the stream, for one seed, and what stops its readers.

    Args:
        plan: what the programs are made of.
        shardings: of the state.
        cut: the stream's segments.
        train: name to array [N, ...].
        test: likewise.
        tables: the seed's stream.
        workers: processes that read; 0: threads.
    """
    host = jax.device_get(tables)
    marks = {"weights": host.valid.astype(np.float32)}
    marks |= {name: getattr(host, name) for name in learners.MARKS}
    reading = Reader(Batches(train, host.rows, marks), workers, PREFETCH)
    testing = Reader(Batches(test, host.test_rows, {"task": host.test_task}), workers, 2)
    learner = plan.recipe.learner
    same: dict[str, Any] = {"out_shardings": shardings, "donate_argnums": 0}
    donated: dict[str, Any] = {"donate_argnums": 0}

    def ready(batch: Any) -> dict[str, jax.Array]:
        batch = dict(batch)
        number = batch.pop("number")
        if tables.transform:
            batch["inputs"] = transforms.apply(tables.transform, batch["inputs"], number)
        return plan.constrain(batch)

    def steps(state: TrainState, history: Any, window: Any, first: Any, count: Any) -> Any:
        def body(k: jax.Array, carry: Any) -> Any:
            state, history = carry
            batch = ready(jax.tree.map(lambda a: a[k], window))
            return sequence.one_step(plan, state, history, batch, first + k)

        return jax.lax.fori_loop(0, count, body, (state, history))

    learn = jax.jit(steps, donate_argnums=(0, 1), out_shardings=(shardings, None))
    begin = jax.jit(partial(sequence.begin, plan.recipe), **same)
    end = jax.jit(partial(sequence.end, plan.recipe), **same)
    start = jax.jit(partial(sequence.sweep_start, plan.recipe))
    add = jax.jit(
        lambda carry, state, batch, i: sequence.swept(plan.recipe, carry, state, ready(batch), i),
        **donated,
    )
    done = jax.jit(lambda state, carry: sequence.sweep_done(plan.recipe, carry, state))
    give = jax.jit(
        lambda state, batch, k, rank: sequence.given(plan.recipe, state, ready(batch), k, rank),
        **same,
    )
    count = jax.jit(
        lambda right, state, batch: (
            right + sequence.right_answers(plan, state, ready(batch), tables.test_classes)
        ),
        **donated,
    )
    put = jax.jit(sequence.with_right, **same)

    def evaluated(state: TrainState, place: int) -> TrainState:
        right = jnp.zeros(state.learner["right"].shape[-1], jnp.int32)
        for k in range(len(host.test_rows)):
            right = count(right, state, one(testing, k))
        return put(state, right, np.int32(place))

    def closed(state: TrainState, sweep_steps: np.ndarray) -> TrainState:
        sweep = learner.sweep
        if sweep is not None:
            low, high = int(sweep_steps[0]), int(sweep_steps[1])
            high = min(high, low + sweep.batches) if sweep.batches else high
            carry = start(state)
            for i in range(low, high):
                carry = add(carry, state, one(reading, i), np.int32(i))
            state, priority = done(state, carry)
            for i in range(low, high) if priority is not None else ():
                state = give(state, one(reading, i), np.int32(i - low), priority)
        return end(state)

    def advance(state: TrainState, span: np.ndarray) -> tuple[TrainState, np.ndarray]:
        begun, stop, first, last = (int(value) for value in span)
        history = jnp.zeros((plan.records, len(jax.tree.leaves(state.metrics))))
        if begun == 0:
            state = evaluated(state, 0)
        for p in range(first, last):
            low, high = max(int(cut.first[p]), begun), min(int(cut.last[p]), stop)
            if cut.opens[p] and low == cut.first[p]:
                number = cut.experience[p]
                state = begin(state, number, host.classes[number])
            for at in range(low, high, WINDOW):
                here = min(WINDOW, high - at)
                window = jax.tree.map(_padded, reading.read(at, here))
                state, history = learn(state, history, window, np.int32(at), np.int32(here))
            if high == cut.last[p]:
                state = closed(state, cut.sweep[p]) if cut.closes[p] else state
                state = evaluated(state, p + 1)
        return state, np.asarray(jax.device_get(history))

    def close() -> None:
        reading.close()
        testing.close()

    return advance, close


def one(reader: Reader, step: int) -> dict[str, np.ndarray]:
    """Returns one batch."""
    return {name: rows[0] for name, rows in reader.read(step, 1).items()}


def _padded(rows: np.ndarray) -> np.ndarray:
    """Returns the rows of a window, as many as of any: another number would compile again."""
    return np.pad(rows, [(0, WINDOW - len(rows)), *[(0, 0)] * (rows.ndim - 1)])
