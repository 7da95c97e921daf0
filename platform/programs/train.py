"""The program `train`: trains a model, and survives being killed.

The order within the loop is fixed: dispatch a chunk of steps; write the record of an earlier chunk
once its numbers are ready, at the latest when the next record is due; then, where they are due,
evaluate, save, and look whether to stop. What is saved at a step thus always comes after all that
was recorded up to that step, and a run that resumes there repeats neither.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.checkpoints.store import open_store
from lamina.platform.errors import InterruptedRun
from lamina.platform.optimizers import schedules
from lamina.platform.programs import session as sessions
from lamina.platform.programs.context import Context, Outcome
from lamina.platform.reporting import folder, records, storage, writers
from lamina.platform.training import (
    compiled,
    efficiency,
    evaluation,
    initial,
    loading,
    loop,
    samples,
    settings,
)
from lamina.platform.training.experiment import Experiment, assemble
from lamina.platform.training.profiling import Profiler
from lamina.platform.training.recorder import Recorder
from lamina.platform.training.rows import RowWindows
from lamina.platform.training.state import TrainState

FREE = (
    "mesh",
    "sharding",
    "checkpoint",
    "evaluation",
    "log_every",
    "profile",
    "trackers",
    "tracker_options",
    "data.placement",
    "data.workers",
)
"""Keys that may change between two sessions of a run: they don't change what is computed."""


class Prepared(NamedTuple):
    """A training run before its folder exists.

    Attributes:
        parts: the run's parts.
        loaded: what `init_from` gives.
        evaluated: the splits to evaluate.
    """

    parts: Experiment
    loaded: loading.Loaded
    evaluated: list[evaluation.Evaluated]


def prepare(
    config: FrozenConfigDict,
    trust: Sequence[str],
    devices: Sequence[jax.Device] | None,
    fresh: bool,
) -> Prepared:
    """Builds the parts of a run, and loads what a fresh one starts from.

    Raises:
        UserError: the config doesn't fit the data, the devices, or what `init_from` names.
    """
    parts = assemble(config, trust, devices)
    evaluated = evaluation.choose(parts)
    writers.check_trackers(config.trackers)
    if not fresh:
        return Prepared(parts, loading.NOTHING, evaluated)
    loaded = loading.load(config, trust, parts.recipe.model, loading.placement(parts))
    return Prepared(parts, loaded, evaluated)


def forbidden_changes(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """Returns the differences between a run's config and a new one with which it can't go on.

    What is in `FREE` may change, islands may leave or join, seeds may be added, and the run may
    become longer where its past doesn't depend on its length.
    """
    differences = configs.difference(old, new, FREE)
    steps = differences.get("steps")
    longer = steps is not None and isinstance(steps[0], int) and 0 < steps[0] < steps[1]
    every = new["islands"].get("every", 1)  # a last round that was shorter would go on
    if (
        steps is not None
        and longer
        and steps[0] % every == 0
        and schedules.extendable(**new["schedule"])
    ):
        del differences["steps"]
    differences.pop("islands.number", None)
    seeds = differences.get("seeds")
    if seeds is not None and isinstance(seeds[0], tuple) and set(seeds[0]) < set(seeds[1]):
        del differences["seeds"]
    return differences


def train(prepared: Prepared, context: Context) -> Outcome:
    """Trains as the config says, from the newest good checkpoint if there is one.

    Args:
        prepared: the parts of the run.
        context: the run folder and what else a program is given.

    Returns:
        The result and the final state.

    Raises:
        UserError: no checkpoint is usable.
        DivergedError: the loss of every seed became infinite or not a number.
        InterruptedRun: a signal asked the run to stop; it has saved before.
    """
    parts = prepared.parts
    config = parts.config
    workdir = storage.as_path(context.workdir)
    if jax.process_index() == 0:
        rows, activations = compiled.parameter_rows(parts), compiled.activation_rows(parts)
        folder.write_parameters(workdir, rows, activations)
    with contextlib.ExitStack() as stack:
        metric = config.checkpoint.best
        best = (metric, settings.better(metric, config.checkpoint.mode)) if metric else None
        store = open_store(
            os.path.join(context.workdir, folder.CHECKPOINTS),
            keep=config.checkpoint.keep,
            keep_best=best,
        )
        stack.enter_context(contextlib.closing(store))
        session, restored = sessions.resume(parts, prepared.loaded, context, store)
        stack.callback(session.log.close)
        start = session.start
        with session.clock.phase("compile"):
            create = initial.creating(parts, prepared.loaded, restored)
            feed = initial.open_feed(parts)
            stack.callback(feed.close)
            windows = RowWindows(parts, feed, start)
            program = compiled.train_program(parts, feed, windows.abstract)
            evaluators = evaluation.open_evaluators(parts, prepared.evaluated)
            for evaluator in evaluators:
                stack.callback(evaluator.feed.close)
            state = create()
            del create, restored
            jax.block_until_ready(state)
        recorder = sessions.recorder(parts, prepared.loaded, context, store, session, evaluators)
        recorder.check_divergence(jax.device_get(state.nonfinite_step))  # in a session before
        state = train_loop(recorder, program, feed.constants, windows, state, start, context)
        return finish(recorder, state, context)


def train_loop(
    recorder: Recorder,
    program: compiled.Program,
    constants: Any,
    windows: RowWindows,
    state: TrainState,
    start: int,
    context: Context,
) -> TrainState:
    """Trains to the last step, or until a signal, divergence or early stopping.

    Args:
        recorder: writes, evaluates and saves.
        program: a chunk of steps.
        constants: the training data that stay on the devices.
        windows: where its rows come from.
        state: after `start` steps; it is donated.
        start: steps already done.
        context: the run folder and the stop request.

    Returns:
        The state after the last step.

    Raises:
        InterruptedRun: a signal asked to stop.
        DivergedError: the loss of every seed is no longer finite.
    """
    parts = recorder.parts
    c, length = parts.config, parts.config.steps_per_call
    cadences = {"record": c.log_every, "checkpoint": c.checkpoint.every}
    cadences |= {evaluator.name: evaluator.every for evaluator in recorder.evaluators}
    if start >= parts.steps or recorder.stops_early():
        return state
    profiler = Profiler(c.profile, context.workdir)
    pending = None
    with recorder.clock.phase("train"), contextlib.closing(profiler):
        for chunk in loop.chunks(start, parts.steps, length, cadences):
            profiler.enter(chunk)
            with recorder.clock.phase("data"):
                rows, span = windows.of(chunk)
            with jax.transfer_guard("disallow"):
                state, summary = program.call(state, constants, rows, span)
            if pending and ("record" in chunk.due or pending[1]["metrics"].is_ready()):
                recorder.record(*pending)
                pending = None
            if "record" in chunk.due:
                pending = (chunk, summary)
            stop = context.stop.agreed(-(-chunk.end // length))
            if chunk.due <= {"record"} and not stop:
                continue
            jax.block_until_ready(summary)  # so that what follows isn't charged for the training
            if pending:
                recorder.record(*pending)
                pending = None
            recorder.evaluate(chunk.end, chunk.due, state)
            if stop or "checkpoint" in chunk.due:
                recorder.check_divergence(jax.device_get(summary["nonfinite_step"]))
                recorder.save(chunk.end, state, last=stop)
            if stop and chunk.end < parts.steps:
                raise InterruptedRun(
                    f"stopped by {context.stop.signal or 'another process'} after step {chunk.end} "
                    f"of {parts.steps}: the same command resumes"
                )
            if recorder.stops_early():
                break
    return state


def write_samples(parts: Experiment, state: TrainState, context: Context) -> None:
    """Writes the report's samples; whatever is wrong with them doesn't fail a trained run."""
    try:
        folder.write_samples(context.workdir, samples.make(parts, state))
    except Exception as error:
        context.say(f"no samples for the report: {type(error).__name__}: {error}")


def finish(recorder: Recorder, state: TrainState, context: Context) -> Outcome:
    """Evaluates all splits on the final state, saves it, and makes the result."""
    parts, c = recorder.parts, recorder.parts.config
    step = int(np.ravel(jax.device_get(state.step))[0])
    recorder.evaluate(step, frozenset(e.name for e in recorder.evaluators), state)
    recorder.save(step, state, last=True)
    totals = recorder.clock.totals()
    speed = efficiency.figures(parts, step, totals)
    if jax.process_index() == 0:
        with recorder.clock.phase("samples"):
            write_samples(parts, state, context)
    result = {
        "final": records.summarise(recorder.history, seeds=c.seeds),
        "steps": step,
        "epochs": step * c.data.batch_size / len(parts.dataset.splits["train"]),
        "seconds": sum(totals.values()) - totals.get("compile", 0.0),
        "compile_seconds": totals.get("compile", 0.0),
        **speed,
        "energy_joules": recorder.meter.update(),
        "phases": totals,
        "straggler": recorder.stragglers.line,
        "processes": [pace._asdict() for pace in recorder.stragglers.paces],
        "diverged": {str(seed): bad for seed, bad in recorder.diverged.items()},
        "stopped_early": step < parts.steps,
        "best_step": recorder.store.best() if c.checkpoint.best else step,
    }
    return Outcome(storage.plain(result), state)
