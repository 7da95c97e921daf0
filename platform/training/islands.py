"""Islands in the training step: each learns from its part of the batch, and they meet now and then.

The step of one island is that of ordinary training, vectorised over the islands: along the mesh
axis `replica`, or on one device, or both. What all islands have in common stands in the train state
as ever; what each has of its own stands in `TrainState.islands`, along a leading axis. So `params`
are the parameters to evaluate, to export and to go on from: in rounds the outer ones, whose
optimizer's state is `optimizer_state`, and in an exchange the only ones.

Letters: I islands, B rows of a batch.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.platform.optimizers.islands.method import AXIS, Exchange, Method, Rounds
from lamina.platform.training import learners
from lamina.platform.training.state import TrainState, add_metrics
from lamina.sharding.mesh import BATCH_AXES

SENT = "sent_bytes"
"""Name of the metric: the bytes that each island sends in a step."""

OWN = ("params", "model_state", "optimizer_state", "loss_scale")
"""Fields of the train state that each island has for itself in rounds, besides its learner's."""

MEASURED = ("metrics", "nonfinite_step")
"""Fields that each island has for itself until they are put together: for a record, or when the
islands meet. At other steps nothing passes between them."""


class Islands(NamedTuple):
    """How a run's islands learn.

    Attributes:
        method: what they exchange.
        last: numbers of steps done at which a round ends, whole or not: the end of the run, or of
            an experience.
        mesh: of the run.
    """

    method: Method
    last: tuple[int, ...]
    mesh: Mesh

    def ends(self, steps: Any) -> Any:
        """Returns whether a round ends once so many steps are done."""
        if isinstance(self.method, Exchange):
            return True
        return (steps % self.method.every == 0) | _any_of(steps, self.last)

    def sent(self, params: Any, model_state: Any) -> int:
        """Returns the bytes that an island sends when it meets the others."""
        averaged = [leaf for leaf in jax.tree.leaves(model_state) if _is_float(leaf)]
        return self.method.sent(params) + sum(leaf.size * leaf.dtype.itemsize for leaf in averaged)

    def rounds(self, steps: int) -> int:
        """Returns how often the islands have met after so many steps."""
        if isinstance(self.method, Exchange):
            return steps
        every = self.method.every
        return steps // every + sum(last <= steps and last % every > 0 for last in self.last)


def _any_of(steps: Any, last: Sequence[int]) -> Any:
    found = steps == last[0]
    for other in last[1:]:
        found |= steps == other
    return found


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def whole(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that gives every island all of an array [I, ...]."""
    if mesh.shape["replica"] == 1:
        return lambda array: array

    def gathered(array: jax.Array) -> jax.Array:
        spec = P(None, *[P.UNCONSTRAINED] * (array.ndim - 1))
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    return gathered


def begin(islands: Islands, state: TrainState) -> TrainState:
    """Returns the state before the first step with islands, all of them at its parameters.

    Args:
        islands: how they learn.
        state: as it would be without islands.
    """
    method = islands.method
    learner, common = learners.apart(state.learner)
    state = dataclasses.replace(state, learner=common)
    own = {name: getattr(state, name) for name in MEASURED} | {"learner": learner}
    if isinstance(method, Exchange):
        own["momentum"] = method.transformation.init(state.params)
        return dataclasses.replace(state, islands=repeated(own, method.number))
    own |= {name: getattr(state, name) for name in OWN}
    return dataclasses.replace(
        state,
        optimizer_state=method.outer.init(state.params),
        loss_scale={},
        islands=repeated(own, method.number),
    )


def repeated(tree: Any, number: int) -> Any:
    """Returns a tree of which each island has a copy."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (number, *a.shape)), tree)


def seeds(number: int, seed: jax.Array) -> jax.Array:
    """Returns uint32 [I]: the islands' own seeds, of which the first is that of the run."""
    key = jax.random.fold_in(jax.random.key(seed), 5)
    bits = lambda i: jax.random.bits(jax.random.fold_in(key, i), (), jnp.uint32)
    return jnp.where(jnp.arange(number) == 0, seed, jax.vmap(bits)(jnp.arange(number)))


def optimizer_of_one(
    islands: Islands, optimizer: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer in the step of one island.

    In an exchange it is given what comes of the exchange, and the means over the islands of what
    else the step tells an optimizer; its state is (the island's momentum, that of `optimizer`).
    """
    method = islands.method
    if isinstance(method, Rounds):
        return optimizer

    def update(updates: Any, state: Any, params: Any = None, **told: Any) -> tuple[Any, Any]:
        direction, momentum = method.transformation.update(updates, state[0], params)
        updates, common = optimizer.update(
            direction,
            state[1],
            params,
            value=jax.lax.pmean(told["value"], AXIS),
            grad=direction,
            value_fn=lambda params: jax.lax.pmean(told["value_fn"](params), AXIS),
            metrics=jax.lax.pmean(told["metrics"], AXIS),
        )
        return updates, (momentum, common)

    init = lambda params: (method.transformation.init(params), optimizer.init(params))
    return optax.GradientTransformationExtraArgs(init, update)


def train_step(
    islands: Islands,
    one_step: Callable[[TrainState, Any, jax.Array], TrainState],
    state: TrainState,
    batch: Any,
    due: jax.Array,
    ends: jax.Array | bool,
) -> TrainState:
    """Returns the state after one step of every island.

    Args:
        islands: how they learn.
        one_step: of one island: ordinary training with `optimizer_of_one`.
        state: of one seed.
        batch: arrays [B, ...]; island i has the rows from i B / I to (i + 1) B / I.
        due: whether a record follows.
        ends: whether a round ends with the step.
    """
    method = islands.method

    def one(own: Mapping[str, Any], seed: jax.Array, rows: Any) -> Any:
        after = one_step(dataclasses.replace(_of_one(method, state, own), seed=seed), rows, due)
        new = {name: getattr(after, name) for name in MEASURED}
        new["learner"] = learners.apart(after.learner)[0]
        if isinstance(method, Exchange):
            new["momentum"], common = after.optimizer_state
            return new, after.model_state, (after.params, common)
        return new | {name: getattr(after, name) for name in OWN}, (), ()

    how = {"out_axes": (0, 0, None), "axis_name": AXIS}
    own, model_state, common = _mapped(islands, one, state, batch, **how)
    sent = jnp.where(ends, float(islands.sent(state.params, state.model_state)), 0.0)
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        metrics=add_metrics(state.metrics, {SENT: (sent, jnp.ones(()))}),
        islands=own,
    )
    new = jax.lax.cond(due | ends, _put_together, lambda s: s, new)
    if isinstance(method, Rounds):
        return jax.lax.cond(ends, lambda s: _meet(method, s), lambda s: s, new)
    params, optimizer_state = common
    return dataclasses.replace(
        new,
        params=params,
        optimizer_state=optimizer_state,
        model_state=jax.tree.map(_mean, model_state),
    )


def learn(
    islands: Islands,
    change: Callable[[TrainState, Any], TrainState],
    state: TrainState,
    batch: Any,
) -> TrainState:
    """Returns the state after every island's learner has looked at its rows, besides the steps.

    Args:
        islands: how they learn.
        change: (state of one island, its rows) to that state with another learner.
        state: of one seed.
        batch: arrays [B, ...], split as in a step.
    """

    def one(own: Mapping[str, Any], seed: jax.Array, rows: Any) -> Any:
        alone = dataclasses.replace(_of_one(islands.method, state, own), seed=seed)
        return learners.apart(change(alone, rows).learner)[0]

    found = _mapped(islands, one, state, batch)
    return dataclasses.replace(state, islands=state.islands | {"learner": found})


def _mapped(
    islands: Islands, one: Callable[..., Any], state: TrainState, batch: Any, **how: Any
) -> Any:
    """Returns `one` of each island: of what it has of its own, its seed, and its rows."""
    axis = "replica" if islands.mesh.shape["replica"] > 1 else None
    numbers = seeds(islands.method.number, state.seed)
    mapped = jax.vmap(one, spmd_axis_name=axis, **how)
    return mapped(state.islands, numbers, _split(islands, batch))


def _put_together(state: TrainState) -> TrainState:
    """Returns the state with what the islands have measured since the last time."""
    own = state.islands["metrics"]
    return dataclasses.replace(
        state,
        metrics=add_metrics(state.metrics, jax.tree.map(lambda m: jnp.sum(m, axis=0), own)),
        nonfinite_step=jnp.max(state.islands["nonfinite_step"]),
        islands=state.islands | {"metrics": jax.tree.map(jnp.zeros_like, own)},
    )


def _of_one(method: Method, state: TrainState, own: Mapping[str, Any]) -> TrainState:
    """Returns the train state of one island, as ordinary training has it."""
    if isinstance(method, Exchange):
        fields = {"optimizer_state": (own["momentum"], state.optimizer_state)}
    else:
        fields = {name: own[name] for name in OWN}
    fields |= {name: own[name] for name in MEASURED}
    learner = state.learner | own["learner"]
    return dataclasses.replace(state, **fields, learner=learner, ema={}, islands={}, hyper={})


def _split(islands: Islands, batch: Any) -> Any:
    """Returns the rows of each island, [I, B / I, ...]."""
    number, mesh = islands.method.number, islands.mesh
    rows = jax.tree.map(lambda a: a.reshape(number, a.shape[0] // number, *a.shape[1:]), batch)
    if mesh.size == 1:
        return rows
    inner = tuple(axis for axis in BATCH_AXES if axis != "replica")
    sharding = NamedSharding(mesh, P("replica", inner))
    return jax.lax.with_sharding_constraint(rows, sharding)


def _meet(method: Rounds, state: TrainState) -> TrainState:
    """Returns the state at the end of a round: the outer step, from which all islands go on."""
    own = state.islands
    differences = jax.tree.map(lambda x, x_i: x[None] - x_i, state.params, own["params"])
    mean = method.average(differences)
    updates, outer = method.outer.update(mean, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    model_state = jax.tree.map(_mean, own["model_state"])
    own = own | repeated({"params": params, "model_state": model_state}, method.number)
    return dataclasses.replace(
        state, params=params, optimizer_state=outer, model_state=model_state, islands=own
    )


def _mean(leaf: jax.Array) -> jax.Array:
    """Returns the mean over islands; what isn't a float (a count) is that of the first one."""
    return jnp.mean(leaf, axis=0) if _is_float(leaf) else leaf[0]


def island(islands: Islands, state: TrainState, number: int) -> TrainState:
    """Returns the train state of one of the islands of one seed."""
    own = jax.tree.map(lambda a: a[number], state.islands)
    seed = seeds(islands.method.number, state.seed)[number]
    return dataclasses.replace(_of_one(islands.method, state, own), seed=seed)


def rows_of(islands: Islands, batch: Any, number: int) -> Any:
    """Returns the rows of a batch that one of the islands has."""
    return jax.tree.map(lambda a: jnp.split(a, islands.method.number)[number], batch)


def resized(islands: Islands, state: TrainState) -> TrainState:
    """Returns a state of another number of islands: some have left, or some join.

    The last ones leave. In rounds those that join start from the common parameters; their
    optimizers (and what else an island keeps) are copies of the islands' that are there, so that
    they are as far in the schedule.

    Args:
        islands: with the number that there shall be.
        state: of one seed.
    """
    number = islands.method.number
    before = jax.tree.leaves(state.islands)[0].shape[0]
    own = jax.tree.map(lambda a: a[jnp.arange(number) % before], state.islands)
    there = (jnp.arange(number) < before).astype(jnp.float32)
    own["metrics"] = jax.tree.map(lambda m: m * there, own["metrics"])
    if isinstance(islands.method, Rounds):
        common = {"params": state.params, "model_state": state.model_state}
        kept = {name: own[name] for name in common}
        own |= jax.tree.map(
            lambda all, one: jnp.concatenate(
                [all[:before], repeated(one, number - before)] if number > before else [all]
            ),
            kept,
            common,
        )
    return dataclasses.replace(state, islands=own)
