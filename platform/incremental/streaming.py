"""A stream whose data stay on the host: the learner of `sequence`, fed with batches by Grain.

Where the training data are too large for a device (or on disk, as `np.memmap`s), batches are read
ahead by threads or workers, and the loops over segments and batches run on the host. What is
computed, in which order and with which keys, is what `sequence.advance` computes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

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


class Programs(NamedTuple):
    """The parts of the stream's program that are compiled; the host calls them in its order.

    Attributes:
        learn: (state, history, window of batches, first step, steps) -> state, history.
        begin: (state, number of the experience, its classes) -> state.
        end: state -> state.
        sweep_start: state -> carry of the learner's sweep over the experience.
        sweep_add: (carry, state, batch, step) -> carry.
        sweep_done: (state, carry) -> state, priorities of the rows for the memory (or None).
        give: (state, batch, place, priorities) -> state whose memory took the batch's rows.
        answer: (right answers by task, state, test batch) -> right answers.
        put: (state, right answers, place) -> state that holds them.
    """

    learn: Callable[..., tuple[TrainState, jax.Array]]
    begin: Callable[..., TrainState]
    end: Callable[[TrainState], TrainState]
    sweep_start: Callable[[TrainState], Any]
    sweep_add: Callable[..., Any]
    sweep_done: Callable[..., tuple[TrainState, Any]]
    give: Callable[..., TrainState]
    answer: Callable[..., jax.Array]
    put: Callable[..., TrainState]


def jitted(plan: Plan, shardings: TrainState, tables: Tables) -> Programs:
    """Returns the programs, which are compiled when they are first called."""
    recipe = plan.recipe
    same: dict[str, Any] = {"out_shardings": shardings, "donate_argnums": 0}

    def ready(batch: Any) -> dict[str, jax.Array]:
        batch = dict(batch)
        number = batch.pop("number")
        if tables.transform:
            batch["inputs"] = transforms.apply(tables.transform, batch["inputs"], number)
        return plan.constrain(batch)

    def learn(state: TrainState, history: Any, window: Any, first: Any, count: Any) -> Any:
        def body(k: jax.Array, carry: Any) -> Any:
            state, history = carry
            batch = ready(jax.tree.map(lambda a: a[k], window))
            return sequence.one_step(plan, state, history, batch, first + k)

        return jax.lax.fori_loop(0, count, body, (state, history))

    def add(carry: Any, state: TrainState, batch: Any, step: Any) -> Any:
        return sequence.swept(recipe, carry, state, ready(batch), step)

    def give(state: TrainState, batch: Any, place: Any, priority: Any) -> TrainState:
        return sequence.given(recipe, state, ready(batch), place, priority)

    def answer(right: jax.Array, state: TrainState, batch: Any) -> jax.Array:
        return right + sequence.right_answers(plan, state, ready(batch), tables.test_classes)

    return Programs(
        learn=jax.jit(learn, donate_argnums=(0, 1), out_shardings=(shardings, None)),
        begin=jax.jit(partial(sequence.begin, recipe), **same),
        end=jax.jit(partial(sequence.end, recipe), **same),
        sweep_start=jax.jit(partial(sequence.sweep_start, recipe)),
        sweep_add=jax.jit(add, donate_argnums=0),
        sweep_done=jax.jit(lambda state, carry: sequence.sweep_done(recipe, carry, state)),
        give=jax.jit(give, **same),
        answer=jax.jit(answer, donate_argnums=0),
        put=jax.jit(sequence.with_right, **same),
    )


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
    run, learner = jitted(plan, shardings, tables), plan.recipe.learner
    sweep, memory = learner.sweep, learner.memory

    def evaluated(state: TrainState, place: int) -> TrainState:
        right = jnp.zeros(state.learner["right"].shape[-1], jnp.int32)
        for k in range(len(host.test_rows)):
            right = run.answer(right, state, one(testing, k))
        return run.put(state, right, np.int32(place))

    def closed(state: TrainState, sweep_steps: np.ndarray) -> TrainState:
        low, high = (int(step) for step in sweep_steps)
        priority = None
        if sweep is not None:
            last = min(high, low + sweep.batches) if sweep.batches else high
            carry = run.sweep_start(state)
            for i in range(low, last):
                carry = run.sweep_add(carry, state, one(reading, i), np.int32(i - low))
            state, priority = run.sweep_done(state, carry)
        if memory is not None and memory.at_end:
            for i in range(low, high):
                state = run.give(state, one(reading, i), np.int32(i - low), priority)
        return run.end(state)

    def advance(state: TrainState, span: np.ndarray) -> tuple[TrainState, np.ndarray]:
        begun, stop, first, last = (int(value) for value in span)
        history = jnp.zeros((plan.records, len(jax.tree.leaves(state.metrics))))
        if begun == 0:
            state = evaluated(state, 0)
        for p in range(first, last):
            low, high = max(int(cut.first[p]), begun), min(int(cut.last[p]), stop)
            if cut.opens[p] and low == cut.first[p]:
                number = cut.experience[p]
                state = run.begin(state, number, host.classes[number])
            for at in range(low, high, WINDOW):
                here = min(WINDOW, high - at)
                window = jax.tree.map(_padded, reading.read(at, here))
                state, history = run.learn(state, history, window, np.int32(at), np.int32(here))
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
