"""The program `incremental`: a learner on a stream, evaluated after each experience.

The whole stream is one compiled program (unless the data stay on the host: see
`lamina.platform.incremental.streaming`), which is dispatched in parts of `steps_per_call` steps
(0: as far as the next checkpoint, or the end). Between dispatches records are written, checkpoints
saved, and signals heard; what is computed doesn't depend on where they are. Several seeds are one
vmapped program on accelerators; on CPU the program of one seed is dispatched for each, side by
side, so that every seed computes what it would alone, bit for bit.
"""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.checkpoints.store import open_store
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import InterruptedRun
from lamina.platform.incremental import metrics, results, running, sequence, sources
from lamina.platform.incremental.learners.table import KIND as LEARNER
from lamina.platform.incremental.running import Runner
from lamina.platform.incremental.stream import Shared, Stream
from lamina.platform.incremental.streams import STREAMS
from lamina.platform.programs import session as sessions
from lamina.platform.programs.context import Context, Outcome
from lamina.platform.reporting import folder, records, storage, writers
from lamina.platform.training import (
    compiled,
    efficiency,
    experiment,
    initial,
    layout,
    learners,
    loading,
    loop,
)
from lamina.platform.training import contradictions as training_contradictions
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.recorder import Recorder
from lamina.platform.training.state import TrainState
from lamina.sharding import rules as partition_rules

FREE = ("mesh", "sharding", "checkpoint", "trackers", "tracker_options", "steps_per_call")
"""Keys that may change between two sessions of a run: they don't change what is computed."""

REFUSED = {
    "steps": 0,
    "epochs": 0.0,
    "accumulation": 1,
    "evaluators": {},
    "checkpoint.best": "",
    "early_stopping.metric": "",
    "debug.check_nans": False,
    "debug.overfit_one_batch": False,
}
"""Keys of training that a stream decides, or that have no meaning in it, at their defaults."""


def contradictions(c: FrozenConfigDict):
    """Yields what is wrong between keys whose types are right."""
    for key, default in REFUSED.items():
        block, _, last = key.rpartition(".")
        value = configs.thaw(c[block] if block else c)[last]
        if value != default:
            yield f"{key} = {value!r}: an incremental run doesn't have it (stream.epochs decides)"
    if not c.seeds or len(set(c.seeds)) != len(c.seeds):
        yield f"seeds = {c.seeds} should be different values, at least one"
    elif any(not 0 <= s < 2**32 for s in c.seeds):
        yield f"seeds = {c.seeds}: values lie between 0 and 2**32 - 1"
    for key, least in (("log_every", 1), ("steps_per_call", 0), ("evaluation.every", 0)):
        block, _, last = key.rpartition(".")
        value = (c[block] if block else c)[last]
        if value < least:
            yield f"{key} = {value} should be at least {least}"
    if c.steps_per_call > 0 and c.checkpoint.every % c.steps_per_call:
        yield (
            f"checkpoint.every = {c.checkpoint.every} is no multiple of steps_per_call = "
            f"{c.steps_per_call}: checkpoints are saved between dispatches"
        )
    if c.data.batch_size < 1 or c.evaluation.batch_size < 0:
        yield "data.batch_size should be at least 1, and evaluation.batch_size not negative"
    if c.stream.epochs < 1 or c.stream.repeats < 1:
        yield "stream.epochs and stream.repeats should be at least 1"
    if c.stream.train_on == "train+validation" and c.stream.evaluate_on == "validation":
        yield "stream.evaluate_on = 'validation' is part of what stream.train_on trains on"
    yield from training_contradictions.averages(c)
    if c.clip_norm < 0 or c.checkpoint.keep < 1:
        yield "clip_norm >= 0 and checkpoint.keep >= 1 should hold"


SCHEMA = experiment.SCHEMA._replace(
    kinds={
        **experiment.SCHEMA.kinds,
        "stream": configs.Kind(
            STREAMS, shared=Shared, takes="labels, batch_size, seed, shared", makes=Stream
        ),
        "learner": LEARNER,
    },
    contradictions=contradictions,
)
"""The vocabulary of incremental configs: that of training, a stream and a learner."""


class Prepared(NamedTuple):
    """An incremental run before its folder exists.

    Attributes:
        parts: the run's parts.
        loaded: what `init_from` gives.
        streams: one for each seed, or one for all.
        cut: where they are interrupted.
        data: what is learned from and tested on.
    """

    parts: Experiment
    loaded: loading.Loaded
    streams: tuple[Stream, ...]
    cut: sequence.Segments
    data: sources.Data


def resolve(config: Any, trust: Sequence[str] = configs.EVERYONE) -> FrozenConfigDict:
    """Returns the whole config, checked key by key and for contradictions.

    Raises:
        UserError: lists all mistakes.
    """
    return configs.resolve(config, SCHEMA, trust)


def prepare(
    config: FrozenConfigDict,
    trust: Sequence[str],
    devices: Sequence[jax.Device] | None,
    fresh: bool,
    dataset: Dataset | None = None,
    hyper: Mapping[str, jax.ShapeDtypeStruct] = MappingProxyType({}),
) -> Prepared:
    """Builds the parts of a run, and loads what a fresh one starts from.

    Args:
        config: resolved.
        trust: packages whose factories the config may name.
        devices: the devices to use; default: all.
        fresh: whether the run has no checkpoint yet.
        dataset: default: opened as the config says.
        hyper: config key to the type of a value that is an array of the program, so that runs with
            other values of it can share the program.

    Raises:
        UserError: the learner, the stream, the data and the devices don't fit each other.
    """
    dataset = dataset or experiment.open_dataset(config.data, trust)
    data = sources.open_data(dataset, config.stream.train_on, config.stream.evaluate_on)
    learner = configs.build(config.learner, LEARNER, "learner", trust)
    per_seed = config.data.order == "per_seed"
    streams = sources.build_streams(config, SCHEMA.kinds["stream"], trust, data.labels, learner)
    sources.check_learner(config, learner, streams[0])
    cut = sequence.segments(streams[0], config.evaluation.every)
    space = learners.Space(
        experiences=len(streams[0].steps),
        classes=data.labels.classes,
        tasks=len(streams[0].test_classes),
        points=len(cut.first),
        rows=int(streams[0].epoch_steps.max()) * streams[0].batch_size,
    )
    batch = sources.example_batch(data, streams[0])
    steps = int(streams[0].steps.sum())
    ends = tuple(int(end) for end in np.cumsum(streams[0].steps))
    stream = experiment.Stream(learner, space, steps, per_seed, batch, ends)
    members = experiment.Members(None, hyper) if hyper else None
    parts = experiment.assemble(config, trust, devices, dataset, stream, members)
    writers.check_trackers(config.trackers)
    loaded = loading.NOTHING
    if fresh:
        whole = partition_rules.replicated(parts.mesh)
        loaded = loading.load(config, trust, parts.recipe.model, whole)
    return Prepared(parts, loaded, streams, cut, data)


def forbidden_changes(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """Returns the differences between a run's config and a new one with which it can't go on."""
    differences = configs.difference(old, new, FREE)
    differences.pop("islands.number", None)
    seeds = differences.get("seeds")
    if seeds is not None and isinstance(seeds[0], tuple) and set(seeds[0]) < set(seeds[1]):
        del differences["seeds"]
    return differences


def open_runner(
    prepared: Prepared, compile_program: Callable[..., compiled.Program] | None = None
) -> Runner:
    """Compiles the program, once, whatever the number of seeds; see `running.open_runner`."""
    parts, streams, cut, data = prepared.parts, prepared.streams, prepared.cut, prepared.data
    return running.open_runner(parts, streams, cut, data, compile_program)


def run(
    prepared: Prepared,
    context: Context,
    compile_program: Callable[..., compiled.Program] | None = None,
) -> Outcome:
    """Learns from the stream, from the newest good checkpoint if there is one.

    Args:
        prepared: the parts of the run.
        context: the run folder and what else a program is given.
        compile_program: see `running.open_runner`.

    Returns:
        The result and the final state.

    Raises:
        UserError: no checkpoint is usable.
        DivergedError: the loss of every seed became infinite or not a number.
        InterruptedRun: a signal asked the run to stop; it has saved before.
    """
    parts, c = prepared.parts, prepared.parts.config
    workdir = storage.as_path(context.workdir)
    if jax.process_index() == 0:
        rows, activations = compiled.parameter_rows(parts), compiled.activation_rows(parts)
        folder.write_parameters(workdir, rows, activations)
    with contextlib.ExitStack() as stack:
        directory = os.path.join(context.workdir, folder.CHECKPOINTS)
        store = open_store(directory, keep=c.checkpoint.keep)
        stack.enter_context(contextlib.closing(store))
        session, restored = sessions.resume(parts, prepared.loaded, context, store)
        stack.callback(session.log.close)
        start = session.start
        with session.clock.phase("compile"):
            create = initial.creating(parts, prepared.loaded, restored)
            runner = open_runner(prepared, compile_program)
            stack.callback(runner.close)
            state = create()
            del create, restored
            state = learners.set_hyper(parts.recipe.learner, state)
            jax.block_until_ready(state)
        recorder = sessions.recorder(parts, prepared.loaded, context, store, session)
        recorder.check_divergence(jax.device_get(state.nonfinite_step))
        state = learn(recorder, prepared, runner, state, start, context)
        return finish(recorder, prepared, state, context)


def learn(
    recorder: Recorder,
    prepared: Prepared,
    runner: Runner,
    state: TrainState,
    start: int,
    context: Context,
) -> TrainState:
    """Runs the stream to its end, or until a signal or divergence.

    Raises:
        InterruptedRun: a signal asked to stop.
        DivergedError: the loss of every seed is no longer finite.
    """
    parts, c = prepared.parts, prepared.parts.config
    length = c.steps_per_call or c.checkpoint.every or parts.steps
    if start >= parts.steps:
        return state
    states = runner.split(state)
    del state
    for chunk in loop.chunks(start, parts.steps, length, {"checkpoint": c.checkpoint.every}):
        span = sequence.of_span(prepared.cut, chunk.first, chunk.end)
        with recorder.clock.phase("train"):
            states, sums = runner.advance(states, span)
        results.record_training(recorder, sums, chunk.first, chunk.end)
        results.record_evaluations(recorder, prepared.cut, span, states, prepared.streams)
        stop = context.stop.agreed(-(-chunk.end // length))
        if stop or chunk.due:
            state = runner.join(states)
            recorder.check_divergence(jax.device_get(state.nonfinite_step))
            recorder.save(chunk.end, state, last=stop)
            del state
        if stop and chunk.end < parts.steps:
            raise InterruptedRun(
                f"stopped by {context.stop.signal or 'another process'} after step {chunk.end} "
                f"of {parts.steps}: the same command resumes"
            )
    return runner.join(states)


def finish(recorder: Recorder, prepared: Prepared, state: TrainState, context: Context) -> Outcome:
    """Saves the final state, and makes the result."""
    parts, c = prepared.parts, prepared.parts.config
    recorder.check_divergence(jax.device_get(state.nonfinite_step))
    recorder.save(parts.steps, state, last=True)
    accuracy, before = results.accuracies(state, prepared.streams)
    ends = [int(p) for p in np.flatnonzero(prepared.cut.closes)]
    if jax.process_index() == 0:
        results.write_accuracies(context.workdir, accuracy, before)
    scores = results.scores(accuracy, before, ends)
    totals = recorder.clock.totals()
    training = totals.get("train", 0.0)
    per_second = parts.steps / training if training else 0.0
    summary = {name: records.summary(list(values))._asdict() for name, values in scores.items()}
    result = {
        "final": {**summary, **records.summarise(recorder.history, seeds=c.seeds)},
        "steps": parts.steps,
        "seconds": sum(totals.values()) - totals.get("compile", 0.0),
        "compile_seconds": totals.get("compile", 0.0),
        "steps_per_second": per_second,
        "examples_per_second": per_second * c.data.batch_size * parts.seeds.number,
        **efficiency.shares(totals),
        **efficiency.traffic(parts, parts.steps),
        "energy_joules": recorder.meter.update(),
        "phases": totals,
        "learner_bytes": layout.bytes_per_device(parts.state.learner) // parts.seeds.number,
        "accuracy": results.matrix(accuracy, prepared.cut),
        "diverged": {str(seed): bad for seed, bad in recorder.diverged.items()},
    }
    assert set(metrics.METRICS) <= set(result["final"])
    return Outcome(storage.plain(result), state)
