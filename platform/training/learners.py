"""What an incremental learner is: pure functions that the training step calls.

Plain training is the learner that does nothing, `Learner()`: every hook is the identity, its state
is empty, and the compiled step is the same as if there were none. The learners themselves and the
streams they learn from are in `lamina.platform.incremental`; here is only what the step must know.

Letters: B rows of the stream's batch, R rows with those of the memory, C classes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamina.models.spec import Output
from lamina.platform.data.feed import normalise
from lamina.platform.training.state import TrainState

Own = dict[str, Any]
"""A learner's own state: nested dicts of arrays, with its numeric hyper-parameters among them."""

Batch = dict[str, jax.Array]
STREAM = "stream"
"""Name of the rows of a mixed batch that come from the stream."""

MARKS = ("fresh", "arrives")
"""What a batch of a stream says of its rows besides their weights: bool [B], whether an example
comes for the first time in its experience, and whether for the first time in its pass."""

_OWN, _MEMORY, _MOMENT = "own", "memory", "moment"


class Space(NamedTuple):
    """The sizes of a stream, known before the run.

    Attributes:
        experiences: their number.
        classes: outputs of the model.
        tasks: test tasks.
        points: evaluations after the one before training.
        rows: most rows, with padding, of an experience's first pass.
    """

    experiences: int
    classes: int
    tasks: int
    points: int
    rows: int


class Moment(NamedTuple):
    """Where in the stream the learner is: arrays only, so that it can be traced.

    Attributes:
        experience: int32 [], from 0.
        seen: bool [C]: classes of this and of earlier experiences.
        now: bool [C]: classes of this experience.
        step: int32 []: steps done.
        key: of this learner at this step.
    """

    experience: jax.Array
    seen: jax.Array
    now: jax.Array
    step: jax.Array
    key: jax.Array


class Mixed(NamedTuple):
    """A batch of the stream, with the rows that were drawn from the memory behind it.

    Attributes:
        batch: name to array [R, ...]; "weights" float32 [R] says which rows count in the loss, and
            "there" which rows are real (a memory may hold less than is drawn).
        groups: name to rows: "stream", and one name per draw.
    """

    batch: Batch
    groups: Mapping[str, slice]

    def of(self, group: str) -> Batch:
        """Returns the rows of one group."""
        return {name: array[self.groups[group]] for name, array in self.batch.items()}


class Draw(NamedTuple):
    """Rows that a learner wants from the memory at every step.

    Attributes:
        rows: how many; 0: as many as the stream's batch has.
        labelled: whether they count in the task's loss, beside the stream's.
    """

    rows: int
    labelled: bool


class Memory(NamedTuple):
    """The memory of a learner (or of a chain of them, which share one).

    Attributes:
        init: `(space, example rows) -> memory`, from `jax.ShapeDtypeStruct`s of rows. Its "rows"
            are arrays whose first dimension are the slots: they are split over the devices.
        insert: `(memory, rows, there bool [B], moment, priority) -> memory`. The priority is what a
            learner's sweep gives, float32 [B], or None: the memory draws it.
        draw: `(memory, number of rows, moment) -> (rows, there bool [M])`.
        draws: name to what is drawn at every step.
        stores: what is kept of a row besides inputs and labels: "logits" of the model then. Where
            there are any, a row is inserted again in each pass, as those of the first tell little;
            otherwise once in its experience.
        slots: how many rows it holds.
        kind: what it is, in words: memories of one kind can be shared.
        at_end: whether the rows of an experience come at its end, and not at its steps.
    """

    init: Callable[[Space, Mapping[str, Any]], Own]
    insert: Callable[[Own, Batch, jax.Array, Moment, jax.Array | None], Own]
    draw: Callable[[Own, int, Moment], tuple[Batch, jax.Array]]
    draws: Mapping[str, Draw]
    stores: tuple[str, ...]
    slots: int
    kind: str
    at_end: bool = False


class Setup(NamedTuple):
    """What a learner's state is made from.

    Attributes:
        params: trained parameters, as they are drawn.
        forward: `(trained parameters, batch) -> Output`, in evaluation mode.
        batch: of the stream, as `jax.ShapeDtypeStruct`s.
        space: the stream's sizes.
        key: of this learner.
    """

    params: Any
    forward: Callable[[Any, Batch], Output]
    batch: Mapping[str, Any]
    space: Space
    key: jax.Array


class Sweep(NamedTuple):
    """A pass over the data of an experience at its end, batch by batch.

    Attributes:
        start: `(own, params, moment) -> carry`.
        add: `(carry, own, params, mixed, forward, moment) -> carry`; `forward` is in evaluation
            mode.
        finish: `(carry, own, params, moment) -> own`.
        batches: at most so many of the experience's first batches; 0: all.
        priority: `(carry, own, params, moment) -> float32 [rows of the pass]`, with which a memory
            that takes rows at the end of an experience is given them; None: it draws them.
    """

    start: Callable[..., Any]
    add: Callable[..., Any]
    finish: Callable[..., Own]
    batches: int = 0
    priority: Callable[..., jax.Array] | None = None


class Learner(NamedTuple):
    """A way to learn from a stream; the default of every hook does nothing.

    `own` is the learner's state, `params` are the trained parameters, `forward` is
    `(params, batch) -> Output`. A hook that changes a train state, which is a frozen dataclass,
    returns `dataclasses.replace(state, params=...)`.

    Attributes:
        init: `(setup) -> own`.
        begin: `(own, train state, moment) -> (own, train state)`, before an experience.
        output: `(own, output, mixed, moment) -> output`, before the loss: masks of logits.
        loss: `(loss, own, params, mixed, output, moment, forward) -> loss`. The first is the mean
            over the rows that count: a penalty adds to it, a replacement ignores it.
        gradient: `(gradient, own, params, gradient_of, moment, memory) -> gradient`, where
            `gradient_of(rows)` is that of the task's mean loss on other rows.
        after: `(own, before, after, gradient, mixed, output, moment) -> (own, after)`: train
            states, and what the model answered before the step.
        sweep: a pass over the experience's data at its end, or None.
        review: `(own, params, rows, there bool [N], forward, moment) -> own`, after the sweep:
            a look at the rows of the memory.
        end: `(own, train state, moment) -> (own, train state)`, after the sweep.
        predict: `(own, output, moment) -> logits [B, C]`, for evaluation.
        memory: what is remembered of earlier data, or None.
        hyper: numeric hyper-parameters: leaves of `own`, under their names.
        needs: "boundaries" if it must be told where an experience begins, "pretrained" if the
            model must not start from random parameters, "classes" if an example has one class,
            "first" if it replaces the loss, so that no link of a chain may add to it before.
        arrange: `(stream) -> stream`, on the host: other data for each experience.
    """

    init: Callable[[Setup], Own] = lambda setup: {}
    begin: Callable[..., tuple[Own, TrainState]] = lambda own, state, moment: (own, state)
    output: Callable[..., Output] = lambda own, output, mixed, moment: output
    loss: Callable[..., jax.Array] = lambda loss, *rest: loss
    gradient: Callable[..., Any] = lambda gradient, *rest: gradient
    after: Callable[..., tuple[Own, TrainState]] = lambda own, before, after, *rest: (own, after)
    sweep: Sweep | None = None
    review: Callable[..., Own] = lambda own, *rest: own
    end: Callable[..., tuple[Own, TrainState]] = lambda own, state, moment: (own, state)
    predict: Callable[..., jax.Array] = lambda own, output, moment: output.logits
    memory: Memory | None = None
    hyper: Mapping[str, Any] = {}
    needs: frozenset[str] = frozenset()
    arrange: Callable[[Any], Any] = lambda stream: stream


PLAIN = Learner()
"""Plain training."""


def start(learner: Learner, setup: Setup) -> Own:
    """Returns what `TrainState.learner` is before the first step; {} for plain training."""
    if learner is PLAIN:
        return {}
    space = setup.space
    state: Own = {
        _OWN: _joined(learner.init(setup), jax.tree.map(lambda _: jnp.zeros(()), learner.hyper)),
        _MOMENT: {
            "experience": jnp.zeros((), jnp.int32),
            "seen": jnp.zeros(space.classes, bool),
            "now": jnp.zeros(space.classes, bool),
        },
    }
    state["right"] = jnp.zeros((1 + space.points, space.tasks), jnp.int32)
    if learner.memory is not None:
        rows = {k: v for k, v in setup.batch.items() if k not in ("weights", *MARKS)}
        if "logits" in learner.memory.stores:
            answer = lambda params, batch: setup.forward(params, normalise(batch)).logits
            rows["logits"] = jax.eval_shape(answer, setup.params, dict(setup.batch))
        state[_MEMORY] = learner.memory.init(space, rows)
    return state


def set_hyper(learner: Learner, state: TrainState) -> TrainState:
    """Returns the state with the learner's hyper-parameters, which are no part of a program."""
    if not learner.hyper:
        return state

    def put(own: Any, values: Any) -> Any:
        if isinstance(values, Mapping):
            return own | {name: put(own[name], value) for name, value in values.items()}
        return jax.device_put(np.full(own.shape, values, own.dtype), own.sharding)

    if state.islands:
        islands = state.islands["learner"]
        islands = islands | {_OWN: put(islands[_OWN], learner.hyper)}
        return dataclasses.replace(state, islands=state.islands | {"learner": islands})
    return with_own(state, put(own_of(state), learner.hyper))


def _joined(own: Own, hyper: Mapping[str, Any]) -> Own:
    """Returns a learner's state with its hyper-parameters in it, at any depth."""
    inner = {
        name: _joined(own.get(name, {}), value) if isinstance(value, Mapping) else value
        for name, value in hyper.items()
    }
    return own | inner


def apart(learner: Own) -> tuple[Own, Own]:
    """Returns what each of several islands has of its own in `TrainState.learner`, and the rest."""
    own = {name: part for name, part in learner.items() if name in (_OWN, _MEMORY)}
    common = {name: part for name, part in learner.items() if name not in own}
    return own, common | ({_OWN: {}} if own else {})


def own_of(state: TrainState) -> Own:
    """Returns the learner's own state, with its hyper-parameters."""
    return state.learner.get(_OWN, {})


def memory_of(state: TrainState) -> Own:
    """Returns the memory; {} where there is none."""
    return state.learner.get(_MEMORY, {})


def with_memory(state: TrainState, memory: Own) -> TrainState:
    """Returns the train state with another memory."""
    return dataclasses.replace(state, learner=state.learner | {_MEMORY: memory})


def with_own(state: TrainState, own: Own) -> TrainState:
    """Returns the train state with another own state of its learner."""
    return dataclasses.replace(state, learner=state.learner | {_OWN: own})


def moment_of(state: TrainState) -> Moment:
    """Returns where in the stream a train state is."""
    if not state.learner:
        nothing: Any = None
        return Moment(nothing, nothing, nothing, state.step, nothing)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), 3), state.step)
    return Moment(**state.learner[_MOMENT], step=state.step, key=key)


def enter(state: TrainState, experience: jax.Array, classes: jax.Array) -> Own:
    """Returns `state.learner` at the begin of an experience with these classes (bool [C])."""
    seen = state.learner[_MOMENT]["seen"] | classes
    moment = {"experience": jnp.asarray(experience, jnp.int32), "seen": seen, "now": classes}
    return state.learner | {_MOMENT: moment}


def mix(learner: Learner, state: TrainState, batch: Any) -> Mixed:
    """Returns the batch with what the learner draws from its memory."""
    if learner is PLAIN:
        return Mixed(batch, {})
    moment, parts = moment_of(state), [{k: v for k, v in batch.items() if k not in MARKS}]
    weights = batch.get("weights", jnp.ones(batch["labels"].shape[:1], jnp.float32))
    parts[0] |= {"weights": weights, "there": weights > 0}
    groups, first = {STREAM: slice(0, len(weights))}, len(weights)
    if learner.memory is None:
        return Mixed(normalise(parts[0]), groups)
    for name in learner.memory.stores:
        like = memory_of(state)["rows"][name]
        parts[0][name] = jnp.zeros((len(weights), *like.shape[1:]), like.dtype)
    for number, (name, draw) in enumerate(learner.memory.draws.items()):
        key = jax.random.fold_in(moment.key, number)
        number_of_rows = draw.rows or len(weights)
        rows, there = learner.memory.draw(
            memory_of(state), number_of_rows, moment._replace(key=key)
        )
        counted = there.astype(jnp.float32) * float(draw.labelled)
        parts.append(rows | {"weights": counted, "there": there})
        groups[name] = slice(first, first + number_of_rows)
        first += number_of_rows
    whole = {name: jnp.concatenate([p[name] for p in parts]) for name in parts[0]}
    return Mixed(normalise(whole), groups)


def stream_rows(mixed: Mixed, output: Output) -> tuple[Batch, Output]:
    """Returns the rows that metrics count: those of the stream."""
    if not mixed.groups:
        return mixed.batch, output
    rows = mixed.groups[STREAM]
    return mixed.of(STREAM), jax.tree.map(lambda a: a[rows], output)


def finish_step(
    learner: Learner,
    before: TrainState,
    after: TrainState,
    gradient: Any,
    mixed: Mixed,
    batch: Any,
    output: Output | None,
) -> TrainState:
    """Returns the state after a step, with what the learner changes and remembers.

    Args:
        learner: the learner.
        before: the state before the step.
        after: the state after it.
        gradient: that the optimizer was given.
        mixed: the rows of the step.
        batch: those of the stream as they came, which the memory takes.
        output: the model's, for `mixed`; None in plain training.
    """
    if output is None:
        return after
    moment = moment_of(before)
    changes = {}
    if learner.memory is not None and not learner.memory.at_end:
        rows = dict(batch)
        if "logits" in learner.memory.stores:
            rows["logits"] = output.logits[mixed.groups[STREAM]]
        mark = "arrives" if learner.memory.stores else "fresh"
        there = batch.get(mark, mixed.of(STREAM)["there"])
        key = jax.random.fold_in(moment.key, len(learner.memory.draws))
        changes[_MEMORY] = learner.memory.insert(
            memory_of(before), rows, there, moment._replace(key=key), None
        )
    own, after = learner.after(own_of(before), before, after, gradient, mixed, output, moment)
    return dataclasses.replace(after, learner=after.learner | {_OWN: own} | changes)
