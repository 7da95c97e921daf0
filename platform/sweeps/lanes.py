"""Lanes: parts of a unit that are trained at their own pace, by one compiled program.

Between two checkpoints no lane needs another one. Each dispatches a chunk of steps, and reads what
the chunk before has measured while that runs; nobody waits until all are where a checkpoint is due.
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from lamina.platform.data import feed as feeds
from lamina.platform.data.dataset import Dataset
from lamina.platform.reporting import records
from lamina.platform.reporting.clock import Clock
from lamina.platform.sweeps import planning
from lamina.platform.sweeps.planning import Group, Shape, Trial
from lamina.platform.training import compiled, evaluation, initial, loading, loop, rows, seeds
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.loop import Chunk
from lamina.platform.training.signals import StopRequest
from lamina.platform.training.state import TrainState

AHEAD = 1
"""Chunks that run while the numbers of the one before them are read: enough to keep a lane busy."""


class Compiled(NamedTuple):
    """The programs of a group, which every unit of it runs.

    Attributes:
        group: its trials.
        shape: how they are run.
        parts: of one lane, with the first trial's seeds.
        feed: of the training split; its constants are on the devices.
        program: a chunk of steps of one lane.
        initialise: makes a lane's first state.
        evaluators: of all splits but `test`.
        seconds: that building them took.
        reading: held while a split is evaluated that isn't on the devices: it has one reader.
    """

    group: Group
    shape: Shape
    parts: Experiment
    feed: feeds.Feed
    program: compiled.Program
    initialise: Any
    evaluators: Sequence[evaluation.Evaluator]
    seconds: float
    reading: threading.Lock

    def close(self) -> None:
        """Stops the threads of the feeds."""
        self.feed.close()
        for evaluator in self.evaluators:
            evaluator.feed.close()


class Member(NamedTuple):
    """A trial under one seed."""

    trial: Trial
    seed: int


def compile_group(
    group: Group, shape: Shape, trust: Sequence[str], devices: Any, dataset: Dataset
) -> Compiled:
    """Compiles what runs the group's trials: a training program and one for each split."""
    clock = Clock()
    first = group.trials[0].config
    per_seed = first.data.order == "per_seed"
    plan = seeds.Seeds(shape.members, shape.lowering, per_seed)
    values = tuple(first.seeds[i % len(first.seeds)] for i in range(shape.members))
    parts = planning.assemble(first, group.hyper, plan, values, trust, devices, dataset)
    feed = initial.open_feed(parts)
    try:
        program = compiled.train_program(parts, feed, rows.RowWindows(parts, feed, 0).abstract)
        chosen = [entry for entry in evaluation.choose(parts) if entry.name != "test"]
        evaluators = evaluation.open_evaluators(parts, chosen)
    except BaseException:
        feed.close()
        raise
    initialise = compiled.initialiser(parts)
    seconds, reading = clock.elapsed(), threading.Lock()
    return Compiled(group, shape, parts, feed, program, initialise, evaluators, seconds, reading)


class Lane:
    """A part of a unit's members, which one program runs.

    Args:
        built: the group's programs.
        members: as many as the shape says.
        start: steps already done.
        seconds: of "train" and "evaluate" that they took.
        history: what each member has measured in them.

    Attributes:
        end: steps done.
        state: after them; it is set before the first step.
    """

    state: TrainState

    def __init__(
        self,
        built: Compiled,
        members: Sequence[Member],
        start: int = 0,
        seconds: Mapping[str, float] | None = None,
        history: Sequence[Sequence[records.Record]] = (),
    ):
        c = planning.with_seeds(built.parts.config, tuple(m.seed for m in members))
        self.built, self.members, self.end = built, members, start
        self.seconds = {"train": 0.0, "evaluate": 0.0, **(seconds or {})}
        self.history = [list(entries) for entries in history] or [[] for _ in members]
        self.parts = built.parts._replace(config=c)
        held = built.feed.constants
        # What is read ahead is read from one place: lanes at their own pace need a reader each.
        self._owns_feed = c.data.order == "per_seed" or not held
        feed = initial.open_feed(self.parts) if self._owns_feed else built.feed
        self._feed = feed._replace(constants=held)
        self._windows = rows.RowWindows(self.parts, self._feed, start)

    def close(self) -> None:
        """Stops the threads of its own feed."""
        if self._owns_feed:
            self._feed.close()

    def initialise(self, loaded: loading.Loaded) -> None:
        """Makes the first state."""
        flat = [{**m.trial.values} for m in self.members]
        hyper = {
            key: np.asarray([values[key] for values in flat], leaf.dtype)
            for key, leaf in self.parts.state.hyper.items()
        }
        if len(self.members) == 1:
            hyper = {key: value[0] for key, value in hyper.items()}
        params, model_state = loaded.take()
        start = (dict(params), dict(model_state))
        self.state = self.built.initialise(compiled.seed_values(self.parts), start, hyper)

    def step(self, chunk: Chunk) -> Any:
        """Dispatches a chunk of steps, and returns their sums, which may not be there yet."""
        chosen, span = self._windows.of(chunk)
        self.state, summary = self.built.program.call(
            self.state, self._feed.constants, chosen, span
        )
        self.end = chunk.end
        return summary["metrics"]

    def advance(self, stop: int, goes_on: Callable[[], bool]) -> None:
        """Runs chunks up to step `stop`, or as long as it may.

        Evaluations are not counted as training: a lane waits for its steps before it begins one.

        Args:
            stop: where a checkpoint is due, or the end.
            goes_on: asked before each chunk.
        """
        c, steps = self.parts.config, self.parts.steps
        cadences = {"record": c.log_every} | {e.name: e.every for e in self.built.evaluators}
        running: deque[tuple[Chunk, Any]] = deque()
        since = time.monotonic()

        def book(phase: str) -> None:
            nonlocal since
            now = time.monotonic()
            self.seconds[phase] += now - since
            since = now

        def settle(left: int) -> None:
            while len(running) > left:
                chunk, sums = running.popleft()
                values = list(jax.device_get(sums))
                if "record" in chunk.due:
                    names = jax.tree.structure(self.parts.state.metrics)
                    found = evaluation.means(self.parts, jax.tree.unflatten(names, values))
                    book("train")
                    self._write(chunk.end, "train", found)

        for chunk in loop.chunks(self.end, steps, c.steps_per_call, cadences):
            if chunk.end > stop or not goes_on():
                break
            running.append((chunk, self.step(chunk)))
            due = [e for e in self.built.evaluators if e.name in chunk.due]
            settle(0 if due else AHEAD)
            for evaluator in due:
                book("train")
                found = self._evaluate(evaluator)
                book("evaluate")
                self._write(chunk.end, evaluator.name, found)
        settle(0)
        book("train")

    def _evaluate(self, evaluator: evaluation.Evaluator) -> list[dict[str, float]]:
        with contextlib.nullcontext() if evaluator.feed.constants else self.built.reading:
            return evaluation.evaluate(self.parts, evaluator, self.state)

    def _write(self, step: int, split: str, numbers: list[dict[str, float]]) -> None:
        now = sum(self.seconds.values())
        for history, member, metrics in zip(self.history, self.members, numbers, strict=True):
            for name, value in metrics.items():
                history.append(records.record(step, split, name, value, member.seed, now))


def advance(group: Sequence[Lane], pool: ThreadPoolExecutor, stop: int, halt: StopRequest) -> None:
    """Runs all lanes to step `stop`, as many at a time as the pool has threads.

    Args:
        group: the lanes; some may be further than others.
        pool: whose threads run them.
        stop: where a checkpoint is due, or the end.
        halt: whether a signal has asked to stop: then each lane does, where its chunk ends.
    """
    cancelled = threading.Event()

    def one(lane: Lane) -> None:
        try:
            lane.advance(stop, lambda: not (halt.signal or cancelled.is_set()))
        except BaseException:
            cancelled.set()
            raise

    try:
        list(pool.map(one, group))
    except BaseException:
        cancelled.set()
        raise


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
