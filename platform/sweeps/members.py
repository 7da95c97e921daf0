"""Runs a unit of trials: its members in as many lanes as there are cores, saved as a whole."""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from lamina.platform.checkpoints.store import open_store
from lamina.platform.data import feed as feeds
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import InterruptedRun
from lamina.platform.reporting import records, storage
from lamina.platform.reporting.clock import Clock
from lamina.platform.sweeps import planning
from lamina.platform.sweeps.planning import Group, Shape, Trial
from lamina.platform.training import compiled, evaluation, initial, loading, loop, rows, seeds
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.signals import StopRequest


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
    """

    group: Group
    shape: Shape
    parts: Experiment
    feed: feeds.Feed
    program: compiled.Program
    initialise: Any
    evaluators: Sequence[evaluation.Evaluator]
    seconds: float

    def close(self) -> None:
        """Stops the threads of the feeds."""
        self.feed.close()
        for evaluator in self.evaluators:
            evaluator.feed.close()


class Member(NamedTuple):
    """A trial under one seed."""

    trial: Trial
    seed: int


class Ended(NamedTuple):
    """What a member has measured.

    Attributes:
        member: which.
        records: its numbers, with its seed.
        nonfinite_step: the first step whose loss was not finite, or -1.
    """

    member: Member
    records: list[records.Record]
    nonfinite_step: int


class Finished(NamedTuple):
    """A unit that has ended.

    Attributes:
        ended: its members.
        phases: seconds by phase, over all sessions.
    """

    ended: list[Ended]
    phases: dict[str, float]


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
    return Compiled(group, shape, parts, feed, program, initialise, evaluators, clock.elapsed())


class Lane:
    """A part of a unit's members, which one program runs.

    Args:
        built: the group's programs.
        members: as many as the shape says.
        start: steps already done.
    """

    def __init__(self, built: Compiled, members: Sequence[Member], start: int):
        c = planning.with_seeds(built.parts.config, tuple(m.seed for m in members))
        self.built, self.members = built, members
        self.parts = built.parts._replace(config=c)
        feed = built.feed
        if c.data.order == "per_seed":
            feed = initial.open_feed(self.parts)._replace(constants=feed.constants)
        self.feed = feed
        self.windows = rows.RowWindows(self.parts, feed, start)
        self.state: Any = None
        self.summary: Any = None

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

    def step(self, chunk: loop.Chunk) -> None:
        """Dispatches a chunk of steps."""
        chosen, span = self.windows.of(chunk)
        self.state, self.summary = self.built.program.call(
            self.state, self.feed.constants, chosen, span
        )
        if chunk.due:
            jax.block_until_ready(self.summary)

    def measured(self) -> list[dict[str, float]]:
        """Returns the training metrics since the last record, of each member."""
        names = jax.tree.structure(self.parts.state.metrics)
        values = list(jax.device_get(self.summary["metrics"]))
        return evaluation.means(self.parts, jax.tree.unflatten(names, values))

    def evaluate(self, evaluator: evaluation.Evaluator) -> list[dict[str, float]]:
        """Returns a split's metrics of each member."""
        return evaluation.evaluate(self.parts, evaluator, self.state)


def run(
    built: Compiled,
    trials: Sequence[Trial],
    folder: str,
    loaded: loading.Loaded,
    stop: StopRequest,
) -> Finished:
    """Runs the trials of a unit to their end, from the newest checkpoint if there is one.

    A member whose loss is no longer finite goes on beside the others, which it doesn't touch.

    Args:
        built: the programs.
        trials: of the unit.
        folder: for its checkpoints.
        loaded: what isn't drawn.
        stop: whether a signal has asked to stop.

    Raises:
        InterruptedRun: a signal asked to stop; the unit is saved.
    """
    members = [Member(trial, seed) for trial in trials for seed in trial.config.seeds]
    whole = built.shape.lanes * built.shape.members
    padded = members + [members[-1]] * (whole - len(members))
    size = built.shape.members
    c, steps = built.parts.config, built.parts.steps
    with contextlib.ExitStack() as stack:
        store = open_store(os.path.join(folder, "checkpoints"), keep=1)
        stack.enter_context(contextlib.closing(store))
        abstract = {str(lane): built.parts.state for lane in range(built.shape.lanes)}
        restored = store.restore(abstract)
        start = restored.step if restored else 0
        clock = Clock(restored.extra.get("clock") if restored else None)
        metrics = storage.as_path(folder) / "metrics.jsonl"
        history = records.cut(metrics, start)
        lanes = [Lane(built, padded[i : i + size], start) for i in range(0, whole, size)]
        pool = stack.enter_context(ThreadPoolExecutor(len(lanes)))
        for i, lane in enumerate(lanes):
            if restored:
                lane.state = restored.state[str(i)]
            else:
                lane.initialise(loaded)

        def write(step: int, split: str, by_lane: list[list[dict[str, float]]]) -> None:
            now = clock.elapsed()
            found = [one for lane in by_lane for one in lane][: len(members)]
            for number, numbers in enumerate(found):
                for name, value in numbers.items():
                    history.append(records.record(step, split, name, value, number, now))

        def save(step: int, last: bool = False) -> None:
            storage.write_bytes(metrics, records.lines(history))
            state = {str(i): lane.state for i, lane in enumerate(lanes)}
            store.save(step, state, {"clock": clock.totals()})
            if last:
                store.wait()

        cadences = {"record": c.log_every}
        cadences |= {e.name: e.every for e in built.evaluators}
        cadences |= {"checkpoint": c.checkpoint.every} if c.checkpoint.every else {}
        with clock.phase("train"):
            for chunk in loop.chunks(start, steps, c.steps_per_call, cadences):
                list(pool.map(lambda lane, chunk=chunk: lane.step(chunk), lanes))
                if "record" in chunk.due:
                    write(chunk.end, "train", [lane.measured() for lane in lanes])
                for evaluator in built.evaluators:
                    if evaluator.name in chunk.due:
                        with clock.phase("evaluate"):
                            one = lambda lane, evaluator=evaluator: lane.evaluate(evaluator)
                            write(chunk.end, evaluator.name, list(pool.map(one, lanes)))
                asked = bool(stop.signal)
                if chunk.end < steps and (asked or "checkpoint" in chunk.due):
                    with clock.phase("checkpoint"):
                        save(chunk.end, last=asked)
                if asked and chunk.end < steps:
                    numbers = f"{trials[0].number} to {trials[-1].number}"
                    raise InterruptedRun(
                        f"stopped by {stop.signal} after step {chunk.end} of {steps} of the trials "
                        f"{numbers}: the same command resumes"
                    )
        bad = np.concatenate(
            [np.atleast_1d(jax.device_get(lane.state.nonfinite_step)) for lane in lanes]
        )
    by_number: dict[int, list[records.Record]] = {i: [] for i in range(len(members))}
    for entry in history:
        by_number[entry.seed].append(entry._replace(seed=members[entry.seed].seed))
    ended = [Ended(m, by_number[i], int(bad[i])) for i, m in enumerate(members)]
    return Finished(ended, clock.totals())


def at_once(parts: Experiment, limit: int, members: int) -> int:
    """Returns how many of `members` fit in `limit` bytes.

    A member's share is estimated as four times its state: the state, the next one, gradients, and
    as much for activations.

    Args:
        parts: of one member.
        limit: bytes.
        members: how many are wanted.
    """
    leaves = jax.tree.leaves(parts.state)
    own = 4 * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    return max(1, min(members, int(limit // max(own, 1))))


def memory(device: jax.Device) -> int:
    """Returns the bytes that a program may take on a device: half of what is free."""
    stats: Mapping[str, int] | None = None
    with contextlib.suppress(Exception):  # not every backend counts
        stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
