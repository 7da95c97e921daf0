"""A whole stream as one compiled program: learn, end an experience, evaluate, go on.

The stream is cut into segments, at whose ends the test tasks are evaluated. `advance` runs any part
of it, from one step to another, as loops over segments and steps, so that the same program serves
the whole stream in one dispatch and parts of it between checkpoints. What begins and ends an
experience stands between the loops over steps: no step pays for it.

Letters: S steps of the stream, B batch, P segments, J test tasks, K test batches, T test batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.data.feed import normalise
from lamina.platform.incremental import memory as memories
from lamina.platform.incremental import transforms
from lamina.platform.incremental.stream import Stream
from lamina.platform.training import evaluation_step, islands, learners, step
from lamina.platform.training.learners import STREAM, Mixed
from lamina.platform.training.state import TrainState
from lamina.platform.training.step import Recipe

# What is folded into a moment's key at the end of an experience, for a sweep and for the rows that
# a memory is given: the step after it folds small numbers into the same one.
_SWEEP, _GIVEN = 2000, 3000


class Segments(NamedTuple):
    """Where a stream is interrupted; the same for every seed.

    Attributes:
        first: int32 [P]: first step.
        last: int32 [P]: the step after the last.
        experience: int32 [P].
        opens: bool [P]: whether an experience begins with it.
        closes: bool [P]: whether one ends with it.
        sweep: int32 [P, 2]: steps of the experience's first pass, from and to.
    """

    first: np.ndarray
    last: np.ndarray
    experience: np.ndarray
    opens: np.ndarray
    closes: np.ndarray
    sweep: np.ndarray


def segments(stream: Stream, every: int) -> Segments:
    """Returns the segments of a stream.

    Args:
        stream: the stream.
        every: steps between two evaluations besides those after each experience; 0: none.
    """
    ends = np.cumsum(stream.steps)
    rows: list[tuple[int, ...]] = []
    sweeps: list[tuple[int, int]] = []
    for number, (end, count) in enumerate(zip(ends, stream.steps, strict=True)):
        begin = int(end - count)
        inner = [s for s in range(begin + 1, int(end)) if every and s % every == 0]
        cuts = [begin, *inner, int(end)]
        for place in range(len(cuts) - 1):
            opens, closes = place == 0, place == len(cuts) - 2
            rows.append((cuts[place], cuts[place + 1], number, opens, closes))
            sweeps.append((begin, begin + int(stream.epoch_steps[number])))
    first, last, experience, opens, closes = zip(*rows, strict=True)
    return Segments(
        np.asarray(first, np.int32),
        np.asarray(last, np.int32),
        np.asarray(experience, np.int32),
        np.asarray(opens),
        np.asarray(closes),
        np.asarray(sweeps, np.int32),
    )


def of_span(cut: Segments, start: int, stop: int) -> np.ndarray:
    """Returns int32 [4]: start, stop, and the segments (from, to) that have a part in between."""
    before = int(np.sum(cut.last <= start)) if start else 0
    begun = int(np.sum((cut.first < stop) | (cut.last <= stop)))
    return np.asarray((start, stop, before, begun), np.int32)


class Tables(NamedTuple):
    """One seed's stream, on the devices.

    Attributes:
        rows: int32 [S, B].
        valid: bool [S, B].
        fresh: bool [S, B].
        arrives: bool [S, B].
        classes: bool [E, C].
        test_classes: bool [J, C].
        test_rows: int32 [K, T]: test examples.
        test_task: int32 [K, T]; J for padding.
        transform: of the inputs, or ().
    """

    rows: Any
    valid: Any
    fresh: Any
    arrives: Any
    classes: Any
    test_classes: Any
    test_rows: Any
    test_task: Any
    transform: Any


class Examples(NamedTuple):
    """What all seeds read.

    Attributes:
        train: name to array, with an example in each row.
        test: likewise.
        segments: of the stream.
    """

    train: Any
    test: Any
    segments: Segments


class Plan(NamedTuple):
    """What the program is made of, besides its arguments.

    Attributes:
        recipe: the step's functions.
        mask: which logits count in evaluation.
        ragged: whether a step may have no row at all, and is left out then.
        steps: of the stream.
        constrain: places a batch on the mesh.
    """

    recipe: Recipe
    mask: Literal["all", "seen", "task"]
    ragged: bool
    steps: int
    constrain: Callable[[Any], Any]

    @property
    def records(self) -> int:
        """How many records of the training there are."""
        return -(-self.steps // self.recipe.log_every)


def advance(
    plan: Plan, state: TrainState, examples: Examples, tables: Tables, span: jax.Array
) -> tuple[TrainState, jax.Array]:
    """Learns from a part of the stream.

    Args:
        plan: what the program is made of.
        state: of one seed; its `learner["right"]` counts right answers, int32 [1 + P, J].
        examples: the data.
        tables: the stream.
        span: as `of_span` gives it.

    Returns:
        The state, and the sums of the training metrics for each record in the span: float32
        [records, leaves of the metrics]; 0 for records outside of it.
    """
    cut = examples.segments
    start, stop = span[0], span[1]

    def body(i: jax.Array, carry: Any) -> Any:
        state, history = carry
        return one_step(plan, state, history, select(plan, examples, tables, i), i)

    def segment(p: jax.Array, carry: Any) -> Any:
        state, history = carry
        low, high = jnp.maximum(cut.first[p], start), jnp.minimum(cut.last[p], stop)
        opens = cut.opens[p] & (low == cut.first[p])
        number = cut.experience[p]
        state = jax.lax.cond(
            opens, lambda s: begin(plan.recipe, s, number, tables.classes[number]), same, state
        )
        state, history = jax.lax.fori_loop(low, high, body, (state, history))
        done = high == cut.last[p]
        finish = lambda s: close(plan, s, examples, tables, cut.sweep[p])
        state = jax.lax.cond(done & cut.closes[p], finish, same, state)
        measure = lambda s: evaluated(plan, s, examples, tables, p + 1)
        return jax.lax.cond(done, measure, same, state), history

    leaves = len(jax.tree.leaves(state.metrics))
    history = jnp.zeros((plan.records, leaves))
    first = lambda s: evaluated(plan, s, examples, tables, jnp.int32(0))
    state = jax.lax.cond(start == 0, first, same, state)
    return jax.lax.fori_loop(span[2], span[3], segment, (state, history))


def one_step(
    plan: Plan, state: TrainState, history: jax.Array, batch: Any, i: jax.Array
) -> tuple[TrainState, jax.Array]:
    """Returns the state and the records after step `i`, which learns from `batch`."""
    log_every = plan.recipe.log_every
    fresh = i % log_every == 0
    metrics = jax.tree.map(lambda m: jnp.where(fresh, jnp.zeros_like(m), m), state.metrics)
    state = dataclasses.replace(state, metrics=metrics)
    due = ((i + 1) % log_every == 0) | (i + 1 == plan.steps)
    learn = lambda state: step.train_step(plan.recipe, state, batch, due, i)
    if plan.ragged:
        state = jax.lax.cond(jnp.any(batch["weights"] > 0), learn, lambda s: s, state)
    else:
        state = learn(state)
    sums = jnp.stack(jax.tree.leaves(state.metrics))
    row = jnp.where(due, i // log_every, len(history))
    return state, history.at[row].set(sums, mode="drop")


def same(state: TrainState) -> TrainState:
    """Returns the state as it is."""
    return state


def select(plan: Plan, examples: Examples, tables: Tables, i: jax.Array) -> dict[str, jax.Array]:
    """Returns the batch of step `i`, with its inputs as the data set has them (maybe uint8)."""
    batch = gathered(examples.train, tables.transform, tables.rows[i])
    batch |= {"weights": tables.valid[i].astype(jnp.float32)}
    batch |= {name: getattr(tables, name)[i] for name in learners.MARKS}
    return plan.constrain(batch)


def gathered(arrays: Any, transform: Any, index: jax.Array) -> dict[str, jax.Array]:
    """Returns examples; an index beyond the last one is that of a transformed example."""
    if not transform:
        return {name: array[index] for name, array in arrays.items()}
    count = len(arrays["labels"])
    batch = {name: array[index % count] for name, array in arrays.items()}
    return batch | {"inputs": transforms.apply(transform, batch["inputs"], index // count)}


def begin(recipe: Recipe, state: TrainState, number: jax.Array, classes: jax.Array) -> TrainState:
    """Returns the state at the begin of an experience."""
    state = dataclasses.replace(state, learner=learners.enter(state, number, classes))
    own, state = recipe.learner.begin(learners.own_of(state), state, learners.moment_of(state))
    return learners.with_own(state, own)


def close(
    plan: Plan, state: TrainState, examples: Examples, tables: Tables, steps: jax.Array
) -> TrainState:
    """Returns the state after the end of an experience.

    Args:
        plan: what the program is made of.
        state: after its last step.
        examples: the data.
        tables: the stream.
        steps: int32 [2]: from and to which step the experience is swept.
    """
    sweep, memory, priority = plan.recipe.learner.sweep, plan.recipe.learner.memory, None
    if sweep is not None:
        last = jnp.minimum(steps[1], steps[0] + sweep.batches) if sweep.batches else steps[1]
        body = lambda i, carry: swept(
            plan.recipe, carry, state, select(plan, examples, tables, i), i - steps[0]
        )
        carry = sweep_start(plan.recipe, state)
        carry = jax.lax.fori_loop(steps[0], last, body, carry)
        state, priority = sweep_done(plan.recipe, carry, state)
    if memory is not None and memory.at_end:
        give = lambda i, state: given(
            plan.recipe, state, select(plan, examples, tables, i), i - steps[0], priority
        )
        state = jax.lax.fori_loop(steps[0], steps[1], give, state)
    return end(plan.recipe, state)


def sweep_start(recipe: Recipe, state: TrainState) -> Any:
    """Returns the carry of the learner's sweep before its first batch."""
    assert recipe.learner.sweep is not None
    arguments = (learners.own_of(state), state.params, learners.moment_of(state))
    return recipe.learner.sweep.start(*arguments)


def swept(recipe: Recipe, carry: Any, state: TrainState, batch: Any, number: jax.Array) -> Any:
    """Returns the carry of the learner's sweep after its batch `number`; repeats count once."""
    assert recipe.learner.sweep is not None
    fresh = batch["fresh"]
    rows = {k: v for k, v in batch.items() if k not in learners.MARKS}
    rows |= {"weights": fresh.astype(jnp.float32), "there": fresh}
    mixed = Mixed(normalise(rows), {STREAM: slice(0, len(fresh))})
    moment = _at_end(state, _SWEEP, number)
    forward = lambda params, rows: step.forward(recipe, params, state, rows)
    own = learners.own_of(state)
    return recipe.learner.sweep.add(carry, own, state.params, mixed, forward, moment)


def _at_end(state: TrainState, purpose: int, number: jax.Array) -> learners.Moment:
    """Returns the moment with a key for a batch of the experience that ends."""
    moment = learners.moment_of(state)
    key = jax.random.fold_in(jax.random.fold_in(moment.key, purpose), number)
    return moment._replace(key=key)


def sweep_done(
    recipe: Recipe, carry: Any, state: TrainState
) -> tuple[TrainState, jax.Array | None]:
    """Returns the state after the learner's sweep, and the priorities that it gives, if any."""
    sweep, moment = recipe.learner.sweep, learners.moment_of(state)
    assert sweep is not None
    own = sweep.finish(carry, learners.own_of(state), state.params, moment)
    state = learners.with_own(state, own)
    priority = sweep.priority(carry, own, state.params, moment) if sweep.priority else None
    return state, priority


def given(
    recipe: Recipe, state: TrainState, batch: Any, number: jax.Array, priority: jax.Array | None
) -> TrainState:
    """Returns the state whose memory was given a batch of the experience that ends.

    Args:
        recipe: the step's functions.
        state: after the sweep.
        batch: rows as the data set has them.
        number: int32 []: of the batch in the experience's first pass.
        priority: float32: of all rows of the pass; None: the memory draws them.
    """
    if recipe.islands is not None:
        alone = recipe._replace(islands=None)
        change = lambda state, rows: given(alone, state, rows, number, priority)
        return islands.learn(recipe.islands, change, state, batch)
    assert recipe.learner.memory is not None
    fresh, ranks = batch["fresh"], None
    if priority is not None:
        ranks = jax.lax.dynamic_slice_in_dim(priority, number * len(fresh), len(fresh))
    arguments = (batch, fresh, _at_end(state, _GIVEN, number), ranks)
    memory = recipe.learner.memory.insert(learners.memory_of(state), *arguments)
    return learners.with_memory(state, memory)


def end(recipe: Recipe, state: TrainState) -> TrainState:
    """Returns the state after the learner's end of an experience."""
    learner, moment = recipe.learner, learners.moment_of(state)
    memory = learners.memory_of(state)
    if memory:
        forward = lambda params, rows: step.forward(recipe, params, state, normalise(rows))
        there = memory["priority"] < memories.EMPTY
        arguments = (state.params, memory["rows"], there, forward, moment)
        state = learners.with_own(state, learner.review(learners.own_of(state), *arguments))
    own, state = learner.end(learners.own_of(state), state, moment)
    return learners.with_own(state, own)


def evaluated(
    plan: Plan, state: TrainState, examples: Examples, tables: Tables, place: jax.Array
) -> TrainState:
    """Returns the state with its right answers on each test task at place `place`."""
    count = state.learner["right"].shape[-1]

    def body(right: jax.Array, row: Any) -> tuple[jax.Array, None]:
        index, task = row
        batch = gathered(examples.test, tables.transform, index)
        batch = plan.constrain(batch | {"task": task})
        return right + right_answers(plan, state, batch, tables.test_classes), None

    rows = (tables.test_rows, tables.test_task)
    right, _ = jax.lax.scan(body, jnp.zeros(count, jnp.int32), rows)
    return with_right(state, right, place)


def with_right(state: TrainState, right: jax.Array, place: jax.Array) -> TrainState:
    """Returns the state with the right answers of an evaluation, int32 [J]."""
    table = state.learner["right"].at[place].set(right)
    return dataclasses.replace(state, learner=state.learner | {"right": table})


def right_answers(plan: Plan, state: TrainState, batch: Any, test_classes: jax.Array) -> jax.Array:
    """Returns how many rows of each test task are answered right, int32 [J].

    Args:
        plan: what the program is made of.
        state: its evaluation weights are used.
        batch: "inputs", "labels" and "task" [B]; rows of a task beyond the last don't count.
        test_classes: bool [J, C].
    """
    recipe, count = step.bound(plan.recipe, state.hyper), len(test_classes)
    trained = evaluation_step.evaluation_params(recipe, state)
    output = step.forward(recipe, trained, state, normalise(batch))
    moment = learners.moment_of(state)
    scores = recipe.learner.predict(learners.own_of(state), output, moment)
    task = batch["task"]
    if plan.mask == "task":
        allowed = test_classes[jnp.minimum(task, count - 1)]
        scores = jnp.where(allowed, scores, -jnp.inf)
    elif plan.mask == "seen":
        none = ~jnp.any(moment.seen)  # before the first experience all count
        scores = jnp.where(moment.seen[None, :] | none, scores, -jnp.inf)
    right = (jnp.argmax(scores, axis=-1) == batch["labels"]).astype(jnp.int32)
    right = right.reshape(len(right), -1).sum(-1)  # of a text all tokens are answers
    return jnp.zeros(count, jnp.int32).at[task].add(right, mode="drop")
