"""The run's compiled programs: each is jitted here, once, with its shardings and donation."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamina.models import placement
from lamina.platform.data.feed import Feed
from lamina.platform.errors import DivergedError
from lamina.platform.training import chunk, evaluation_step, layout, preloading, step
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.state import Metrics, TrainState
from lamina.sharding import rules as partition_rules
from lamina.sharding import view


class Program(NamedTuple):
    """A compiled program. It can't compile again: other shapes are an error.

    Attributes:
        call: runs it.
    """

    call: Callable[..., Any]


def compile_program(jitted: Any, *arguments: Any) -> Program:
    """Compiles a jitted function for `arguments` (arrays or `jax.ShapeDtypeStruct`s)."""
    lowered = jitted.lower(*arguments)
    preloading.begin()
    return Program(lowered.compile())


def initialiser(experiment: Experiment) -> Any:
    """Returns `(seeds uint32, loaded (params, model state), hyper) -> state`, made sharded.

    It runs once, so that on CPU it is compiled in half the time, with fewer optimizations; they
    change no number.
    """
    recipe, seeds = experiment.recipe, experiment.seeds._replace(per_seed_rows=False)
    axes = int(seeds.number > 1)
    metrics = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype), experiment.state.metrics
    )
    create = seeds.lift(
        lambda own, loaded: step.init(
            recipe, experiment.batch, own[0], loaded[0], loaded[1], own[1], metrics
        )
    )

    def initialise(values: jax.Array, loaded: Any, hyper: Any) -> TrainState:
        return seeds.join(create(seeds.split((values, hyper)), loaded))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, experiment.state)
    on_cpu = experiment.mesh.devices.flat[0].platform == "cpu"
    quick = {"xla_backend_optimization_level": 1} if on_cpu else None
    return jax.jit(initialise, out_shardings=shardings, compiler_options=quick)


def seed_values(experiment: Experiment) -> np.ndarray:
    """Returns the seeds' values, uint32: [S], or [] for a single seed."""
    values = np.asarray(experiment.config.seeds, np.uint32)
    return values[0] if experiment.seeds.number == 1 else values


def train_program(experiment: Experiment, feed: Feed, rows: Any) -> Program:
    """Returns `(state, constants, rows, span) -> (state, summary)`; the state is donated.

    Args:
        experiment: the run's parts.
        feed: of the training split.
        rows: the abstract rows of a window (`rows.RowWindows`).
    """
    length = experiment.config.steps_per_call
    steps = partial(
        chunk.train_chunk,
        experiment.recipe,
        experiment.seeds,
        constrained(experiment, feed, experiment.seeds.per_seed_rows),
        length,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, experiment.state)
    whole = partition_rules.replicated(experiment.mesh)
    if experiment.config.debug.check_nans:
        return Program(_checking_nans(jax.jit(steps, out_shardings=(shardings, whole))))
    jitted = jax.jit(steps, donate_argnums=0, out_shardings=(shardings, whole))
    span = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole)
    return compile_program(jitted, experiment.state, feed.constants, rows, span)


def _checking_nans(jitted: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with jax's NaN checks: a call that makes one is run again op by op.

    Nothing may be donated then, and the second run moves constants between host and devices.
    """

    def call(*arguments: Any) -> Any:
        with jax.debug_nans(True), jax.transfer_guard("allow"):
            try:
                return jitted(*arguments)
            except FloatingPointError as error:
                raise DivergedError(f"debug.check_nans: {error}") from error

    return call


def single_step(experiment: Experiment) -> tuple[Any, tuple[Any, Any]]:
    """Returns the jitted step on a whole batch, and its abstract arguments: to analyse, not to run.

    The arguments are the state and the batch, both sharded as in a run.
    """
    plan, recipe = experiment.seeds, experiment.recipe
    one = lambda state, batch: step.train_step(recipe, state, batch, jnp.bool_(True))
    lifted = plan.lift(one, "seed")
    leading = 1 if plan.per_seed_rows else 0
    sharding = partition_rules.batch_sharding(experiment.mesh, leading)
    shape = lambda leaf: (plan.number, *leaf.shape) if leading else leaf.shape
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(shape(leaf), leaf.dtype, sharding=sharding),
        experiment.batch,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, experiment.state)
    jitted = jax.jit(
        lambda state, batch: plan.join(lifted(plan.split(state), batch)),
        donate_argnums=0,
        out_shardings=shardings,
    )
    return jitted, (experiment.state, batch)


def evaluation_program(experiment: Experiment, feed: Feed, rows: Any, totals: Any) -> Program:
    """Returns `(totals, state, constants, rows) -> totals`.

    Args:
        experiment: the run's parts.
        feed: of the split.
        rows: what it reads for a call, as `jax.ShapeDtypeStruct`s with shardings.
        totals: the metrics' sums, likewise.
    """
    batches = partial(
        evaluation_step.evaluate_chunk,
        experiment.recipe,
        experiment.seeds,
        constrained(experiment, feed, per_seed=False),
    )
    jitted = jax.jit(batches, out_shardings=partition_rules.replicated(experiment.mesh))
    return compile_program(jitted, totals, experiment.state, feed.constants, rows)


def evaluation_totals(experiment: Experiment, feed: Feed, rows: Any) -> Metrics:
    """Returns the metrics' sums, with the seed axis, as `jax.ShapeDtypeStruct`s with shardings."""
    recipe, count = experiment.recipe, experiment.seeds.number

    def one(constants: Any, rows: Any) -> Metrics:
        batch = feed.select(constants, jax.tree.map(lambda r: r[0], rows))
        params, model_state = recipe.model.init(jax.random.key(0))
        return evaluation_step.evaluate_batch(recipe, params, model_state, batch)

    metrics = jax.eval_shape(one, feed.constants, rows)
    leading = () if count == 1 else (count,)
    whole = partition_rules.replicated(experiment.mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((*leading, *leaf.shape), jnp.float32, sharding=whole),
        metrics,
    )


def constrained(experiment: Experiment, feed: Feed, per_seed: bool) -> Callable[[Any, Any], Any]:
    """Returns the feed's `select`, with the batch split over the mesh's batch axes.

    Args:
        experiment: the run's parts.
        feed: whose `select`.
        per_seed: whether the feed's batches have a leading seed axis.
    """
    if experiment.mesh.size == 1:
        return feed.select
    sharding = partition_rules.batch_sharding(experiment.mesh, int(per_seed))
    return lambda constants, row: jax.lax.with_sharding_constraint(
        feed.select(constants, row), sharding
    )


def parameter_rows(experiment: Experiment) -> list[dict[str, Any]]:
    """Returns one row per parameter of one seed: path, shape, dtype, axes, sharding, bytes.

    The sharding is that of `lamina.sharding.view`, and the bytes are those of all seeds on one
    device.
    """
    seed_axis = 1 if experiment.seeds.number > 1 else 0
    axes = layout.flat(experiment.recipe.model.axes)
    rows = []
    for group in ("params", "frozen"):
        for path, leaf in layout.flat(getattr(experiment.state, group)).items():
            rows.append(
                {
                    "path": path,
                    "shape": list(leaf.shape[seed_axis:]),
                    "dtype": str(leaf.dtype),
                    "axes": [a or "" for a in axes.get(path, ())],
                    "sharding": view.signature(leaf.sharding.spec[seed_axis:], experiment.mesh)
                    or "whole",
                    "bytes": layout.bytes_per_device(leaf),
                    "trained": group == "params",
                }
            )
    return rows


def activation_rows(experiment: Experiment) -> list[dict[str, Any]]:
    """Returns one row per kind of activation that the model places: axes, shape, dtype, sharding.

    The sharding says "P" where each device had a summand before. The bytes are those of one
    activation of one seed's (micro)batch on one device.
    """
    recipe, mesh, parts = experiment.recipe, experiment.mesh, experiment.recipe.accumulation
    if mesh.size == 1:
        return []

    def forward(params: Any, model_state: Any, batch: Any) -> Any:
        arguments, options = recipe.task.inputs(batch)
        return recipe.model.apply(params, model_state, *arguments, train=False, **options)

    rows = lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] // parts, *leaf.shape[1:]), leaf.dtype)
    batch = jax.tree.map(rows, experiment.batch)
    with placement.use(recipe.placement), placement.recorded() as seen:
        jax.eval_shape(forward, recipe.model.params, recipe.model.model_state, batch)
    return [
        {
            "axes": [name or "" for name in each.names],
            "shape": list(each.shape),
            "dtype": each.dtype,
            "before": view.signature(each.spec, mesh, each.partial) if each.partial else "",
            "sharding": view.signature(each.spec, mesh),
            "bytes": view.bytes_per_device(
                each.shape, jnp.dtype(each.dtype).itemsize, each.spec, mesh
            ),
        }
        for each in dict.fromkeys(seen)
    ]
