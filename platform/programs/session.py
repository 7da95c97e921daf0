"""A session of a run: what stands between opening its checkpoints and its first step."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.platform import config as configs
from lamina.platform.checkpoints.manifest import ArrayRecord
from lamina.platform.checkpoints.store import Store
from lamina.platform.programs.context import Context
from lamina.platform.reporting import folder, records, storage, writers
from lamina.platform.reporting.clock import Clock
from lamina.platform.reporting.energy import Meter
from lamina.platform.reporting.protocol import RunInfo, Writer
from lamina.platform.training import evaluation, loading
from lamina.platform.training import islands as archipelago
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.recorder import Recorder
from lamina.platform.training.state import TrainState


class Session(NamedTuple):
    """Where a session begins.

    Attributes:
        start: steps already done.
        clock: seconds by phase, those of earlier sessions included.
        meter: joules, likewise.
        history: the records up to `start`.
        log: what new ones are written to; to be closed.
    """

    start: int
    clock: Clock
    meter: Meter
    history: Sequence[records.Record]
    log: Writer


def resume(
    parts: Experiment, loaded: loading.Loaded, context: Context, store: Store
) -> tuple[Session, TrainState | None]:
    """Goes on from the newest good checkpoint if there is one, and says so.

    Args:
        parts: the run's parts.
        loaded: what a fresh run starts from.
        context: the run folder and what else a program is given.
        store: the checkpoints.

    Returns:
        The session, and the state after its `start` steps (None: there is no checkpoint).

    Raises:
        UserError: no checkpoint is usable.
    """
    restored = store.restore(parts.state, form=partial(_saved_form, parts))
    for note in restored.notes if restored else ():
        context.say(note)
    saved = restored.extra if restored else {}
    start = restored.step if restored else 0
    if loaded.report:
        context.say(f"{parts.config.init_from}: {loaded.report}")
    if restored:
        context.say(f"continues after step {start} of {parts.steps}")
    clock, meter = Clock(saved.get("clock")), Meter(saved.get("joules"))
    # Without a checkpoint the records of step 0, from before training, come again too.
    path = storage.as_path(context.workdir) / folder.METRICS
    history = cut_metrics(path, start if restored else -1)
    session = Session(start, clock, meter, history, open_log(parts, context, start))
    return session, _fitting(parts, restored.state, context) if restored else None


def _saved_form(parts: Experiment, arrays: Mapping[str, ArrayRecord]) -> TrainState:
    """Returns the state of a checkpoint with as many islands as it has, the others' shapes ours."""
    axis = int(parts.seeds.number > 1)
    shapes = [record.shape for name, record in arrays.items() if name.startswith("islands/")]
    if parts.recipe.islands is None or not shapes:
        return parts.state
    number = shapes[0][axis]

    def of(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (*leaf.shape[:axis], number, *leaf.shape[axis + 1 :])
        if shape == leaf.shape:
            return leaf
        sharding = leaf.sharding
        assert isinstance(sharding, NamedSharding)
        spec = P(*sharding.spec[:axis], None, *sharding.spec[axis + 1 :])
        place = NamedSharding(sharding.mesh, spec)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)

    return dataclasses.replace(parts.state, islands=jax.tree.map(of, parts.state.islands))


def _fitting(parts: Experiment, state: TrainState, context: Context) -> TrainState:
    """Returns a restored state with as many islands as the run has now."""
    shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree.islands)]
    if shapes(state) == shapes(parts.state):
        return state
    islands, plan = parts.recipe.islands, parts.seeds._replace(per_seed_rows=False)
    assert islands is not None
    before = shapes(state)[0][int(plan.number > 1)]
    context.say(f"{before} islands so far, {islands.method.number} from here on")
    resize = plan.lift(lambda state, _: archipelago.resized(islands, state))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, parts.state)
    jitted = jax.jit(lambda s: plan.join(resize(plan.split(s), ())), out_shardings=shardings)
    return jitted(state)


def recorder(
    parts: Experiment,
    loaded: loading.Loaded,
    context: Context,
    store: Store,
    session: Session,
    evaluators: Sequence[evaluation.Evaluator] = (),
) -> Recorder:
    """Returns what records, evaluates and saves in a session."""
    start, clock, meter, history, log = session
    say = context.say
    return Recorder(parts, loaded, say, clock, meter, store, log, history, evaluators, start)


def cut_metrics(path: Any, step: int) -> list[records.Record]:
    """Takes the records back to `step`; process 0 changes the file, and all return what stays."""
    if jax.process_count() == 1:
        return records.cut(path, step)
    from jax.experimental import multihost_utils

    if jax.process_index() == 0:
        records.cut(path, step)
    multihost_utils.sync_global_devices("lamina_metrics_cut")
    return [record for record in records.read(path) if record.step <= step]


def open_log(parts: Experiment, context: Context, start: int) -> Writer:
    """Opens all that records are written to."""
    c = parts.config
    info = RunInfo(
        workdir=context.workdir,
        seeds=c.seeds,
        steps=parts.steps,
        start_step=start,
        examples_per_step=c.data.batch_size * parts.seeds.number,
        config=configs.thaw(c),
        process_index=jax.process_index(),
    )
    names = ["jsonl", *(["console"] if context.console else []), *c.trackers]
    options = configs.thaw(c.tracker_options)
    return writers.open_writers(info, {name: options.get(name, {}) for name in names})
