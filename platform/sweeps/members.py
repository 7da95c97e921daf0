"""Runs a unit of trials: its members in lanes, saved as a whole."""

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.checkpoints.store import open_store
from lamina.platform.errors import InterruptedRun
from lamina.platform.reporting import records, storage
from lamina.platform.sweeps import lanes
from lamina.platform.sweeps.lanes import Compiled, Lane, Member
from lamina.platform.sweeps.planning import Trial
from lamina.platform.training import loading
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.signals import StopRequest

METRICS = "metrics.jsonl"


class Ended(NamedTuple):
    """What a member has measured.

    Attributes:
        member: which.
        records: its numbers; their time counts what its lane has done.
        nonfinite_step: the first step whose loss was not finite, or -1.
        seconds: that its training took, over all sessions.
    """

    member: Member
    records: list[records.Record]
    nonfinite_step: int
    seconds: float


class Finished(NamedTuple):
    """A unit that has ended.

    Attributes:
        ended: its members.
        seconds: from its beginning to its end, over all sessions.
    """

    ended: list[Ended]
    seconds: float


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
    every, steps = built.parts.config.checkpoint.every, built.parts.steps
    metrics = storage.as_path(folder) / METRICS
    with contextlib.ExitStack() as stack:
        store = open_store(os.path.join(folder, "checkpoints"), keep=1)
        stack.enter_context(contextlib.closing(store))
        restored = store.restore(_abstract(built))
        group = _open(built, members, restored, metrics)
        for lane in group:
            stack.callback(lane.close)
            if restored is None:
                lane.initialise(loaded)
        began = time.monotonic() - (restored.extra["seconds"] if restored else 0.0)
        pool = stack.enter_context(ThreadPoolExecutor(min(len(group), lanes.cores())))

        def save(last: bool) -> None:
            storage.write_bytes(metrics, _lines(group))
            notes = [{"end": lane.end, "seconds": lane.seconds} for lane in group]
            extra = {"seconds": time.monotonic() - began, "lanes": notes}
            store.save(max(lane.end for lane in group), _together(group), extra)
            if last:
                store.wait()

        while (done := min(lane.end for lane in group)) < steps:
            due = min((done // every + 1) * every, steps) if every else steps
            lanes.advance(group, pool, due, stop)
            done = min(lane.end for lane in group)
            if done < steps:
                save(last=bool(stop.signal))
                if stop.signal:
                    raise InterruptedRun(
                        f"stopped by {stop.signal} after step {done} of {steps} of the trials "
                        f"{trials[0].number} to {trials[-1].number}: the same command resumes"
                    )
        size = built.shape.members
        bad = [np.atleast_1d(jax.device_get(lane.state.nonfinite_step)) for lane in group]
        ended = []
        for number, member in enumerate(members):
            lane, place = group[number // size], number % size
            step, own = int(bad[number // size][place]), lane.seconds["train"] / size
            ended.append(Ended(member, lane.history[place], step, own))
        return Finished(ended, time.monotonic() - began)


def _open(built: Compiled, members: Sequence[Member], restored: Any, metrics: Any) -> list[Lane]:
    """Returns the unit's lanes, with their states if there is a checkpoint."""
    size, whole = built.shape.members, built.shape.lanes * built.shape.members
    padded = [*members] + [members[-1]] * (whole - len(members))
    groups = [padded[i : i + size] for i in range(0, whole, size)]
    if restored is None:
        return [Lane(built, group) for group in groups]
    written: dict[int, list[records.Record]] = {}
    for entry in records.read(metrics):
        written.setdefault(entry.seed, []).append(entry)
    opened = []
    for i, (group, state) in enumerate(zip(groups, _apart(built, restored.state), strict=True)):
        own = restored.extra["lanes"][i]
        history = [
            # What a killed session has written after its last checkpoint is measured again.
            [e._replace(seed=m.seed) for e in written.get(i * size + j, ()) if e.step <= own["end"]]
            for j, m in enumerate(group)
        ]
        lane = Lane(built, group, own["end"], own["seconds"], history)
        lane.state = state
        opened.append(lane)
    return opened


def _lines(group: Sequence[Lane]) -> bytes:
    """Returns the members' records as lines in which the seed is the member's number."""
    histories = [history for lane in group for history in lane.history]
    return records.lines(
        entry._replace(seed=number) for number, history in enumerate(histories) for entry in history
    )


def _abstract(built: Compiled) -> Any:
    """Returns what a checkpoint of a unit holds: the lanes' states, stacked if there are several.

    A file system takes a few large arrays sooner than many small ones.
    """
    count, state = built.shape.lanes, built.parts.state
    if count == 1:
        return state
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), state)


def _together(group: Sequence[Lane]) -> Any:
    """Returns what `_abstract` describes; several lanes, all on a CPU, are stacked on the host."""
    states = [lane.state for lane in group]
    if len(states) == 1:
        return states[0]
    return jax.tree.map(lambda *leaves: jnp.array(np.stack(jax.device_get(leaves))), *states)


def _apart(built: Compiled, state: Any) -> list[Any]:
    """Returns the lanes' states of a restored one."""
    if built.shape.lanes == 1:
        return [state]
    hosts = jax.device_get(state)
    part = lambda i: jax.tree.map(
        # A state is donated: it may not be a view of what has been restored.
        lambda host, like: jax.device_put(host[i].copy(), like.sharding),
        hosts,
        built.parts.state,
    )
    return [part(i) for i in range(built.shape.lanes)]


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
