"""The training step: one pure function."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lamina.models import placement
from lamina.models.functional import FunctionalModel
from lamina.models.spec import Output
from lamina.platform.data.feed import normalise
from lamina.platform.optimizers import loss_scale
from lamina.platform.optimizers.averaging import Averaging
from lamina.platform.training import islands as archipelago
from lamina.platform.training import learners
from lamina.platform.training.learners import Learner, Mixed
from lamina.platform.training.parameters import Parameters, replace
from lamina.platform.training.state import (
    Metrics,
    TrainState,
    add_metrics,
    init_key,
    step_keys,
    zero_metrics,
)
from lamina.platform.training.tasks import Task

Batch = Mapping[str, jax.Array]


class Recipe(NamedTuple):
    """The pure functions of which a training step is made.

    Attributes:
        model: the model's `init` and `apply`.
        task: losses and metrics.
        optimizer: the gradient transformation, clipping included.
        learning_rate: (step, optimizer state after it) to its learning rate, for the record.
        augment: `(key, batch) -> batch`.
        parameters: which parameters are trained, and how all of them follow.
        optimizer_eval_params: (optimizer state, trained parameters) to the ones to evaluate.
        accumulation: parts into which a batch is cut.
        averaging: of the parameters, for evaluation; None keeps no average.
        scale_loss: whether the loss is scaled (float16).
        log_every: steps between two records.
        placement: how the activations lie on the mesh.
        learner: of incremental learning; the default is plain training.
        space: the sizes of its stream, or None.
        islands: how several replicas learn apart, or None.
        rebuild: `TrainState.hyper` to the recipe with these values in place of the config's.
    """

    model: FunctionalModel
    task: Task
    optimizer: optax.GradientTransformationExtraArgs
    learning_rate: Callable[[jax.Array, Any], jax.Array]
    augment: Callable[[jax.Array, Batch], Batch]
    parameters: Parameters
    optimizer_eval_params: Callable[[Any, Any], Any]
    accumulation: int
    averaging: Averaging | None
    scale_loss: bool
    log_every: int
    placement: placement.Placement
    learner: Learner = learners.PLAIN
    space: learners.Space | None = None
    islands: archipelago.Islands | None = None
    rebuild: Callable[[Mapping[str, Any]], Any] | None = None


def bound(recipe: Recipe, hyper: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with a state's own hyper-parameters, where it has any."""
    return recipe.rebuild(hyper) if hyper and recipe.rebuild is not None else recipe


def init(
    recipe: Recipe,
    batch: Any,
    seed: jax.Array,
    loaded_params: Mapping[str, jax.Array],
    loaded_model_state: Mapping[str, jax.Array],
    hyper: Mapping[str, jax.Array] = MappingProxyType({}),
    metrics: Any = None,
) -> TrainState:
    """Returns the state before the first step.

    Args:
        recipe: the step's functions.
        batch: `jax.ShapeDtypeStruct`s of a batch.
        seed: uint32 []: the seed's value.
        loaded_params: path to the value of each parameter that isn't drawn.
        loaded_model_state: path to the value of what isn't new in the model's other state.
        hyper: config key to the value of a hyper-parameter that the state holds, [] each.
        metrics: `jax.ShapeDtypeStruct`s of the sums of metrics. Default: a forward pass is traced,
            which tells them.
    """
    recipe = bound(recipe, hyper)
    key = init_key(seed)
    if loaded_params:
        # A run that goes on from another one of the same seed shall not draw the same values again.
        key = jax.random.fold_in(key, 2)
    params, model_state = recipe.model.init(key)
    trained, frozen = recipe.parameters.partition(
        jax.random.fold_in(key, 1), replace(params, loaded_params)
    )
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        params=trained,
        frozen=frozen,
        model_state=replace(model_state, loaded_model_state),
        optimizer_state=recipe.optimizer.init(trained),
        ema=recipe.averaging.init(trained) if recipe.averaging is not None else {},
        loss_scale=loss_scale.init() if recipe.scale_loss else {},
        metrics={},
        nonfinite_step=jnp.full((), -1, jnp.int32),
        hyper=dict(hyper),
    )
    if recipe.space is not None:
        setup = learners.Setup(
            params=trained,
            forward=lambda trained, batch: forward(recipe, trained, state, batch),
            batch=batch,
            space=recipe.space,
            key=jax.random.fold_in(key, 4),
        )
        state = dataclasses.replace(state, learner=learners.start(recipe.learner, setup))
    metrics = _metrics(recipe, state, batch) if metrics is None else metrics
    state = dataclasses.replace(state, metrics=zero_metrics(metrics))
    return state if recipe.islands is None else archipelago.begin(recipe.islands, state)


def _metrics(recipe: Recipe, state: TrainState, batch: Any) -> Any:
    """Returns the abstract sums of what the task measures, and of what `_update` adds."""

    def measured(state: TrainState, batch: Batch) -> Metrics:
        # The forward pass alone: deriving the gradient of a deep model takes seconds.
        augmentation_key, model_key = step_keys(state.seed, state.step)
        mixed = learners.mix(recipe.learner, state, batch)
        mixed = mixed._replace(batch=recipe.augment(augmentation_key, mixed.batch))
        _, (_, metrics, *_) = _objective(
            recipe, state.params, state, state.model_state, mixed, model_key, 1.0
        )
        return metrics

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    names = ["learning_rate", *jax.eval_shape(_norms, state.params, state.params)]
    names += ["loss_scale"] if recipe.scale_loss else []
    names += [archipelago.SENT] if recipe.islands is not None else []
    own = {name: (scalar, scalar) for name in names}
    return {**jax.eval_shape(measured, state, batch), **own}


def train_step(
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
    due: jax.Array,
    done: jax.Array | None = None,
) -> TrainState:
    """Returns the state after one optimizer step.

    Args:
        recipe: the step's functions.
        state: of one seed.
        batch: arrays whose first dimension are the examples.
        due: bool []: whether a record follows this step; only then are norms measured.
        done: int32 []: steps done before; give it where `state.step` is one of several seeds.
    """
    recipe = bound(recipe, state.hyper)
    if recipe.islands is not None:
        ends = recipe.islands.ends((state.step if done is None else done) + 1)
        optimizer = archipelago.optimizer_of_one(recipe.islands, recipe.optimizer)
        alone = recipe._replace(optimizer=optimizer, islands=None, averaging=None)
        one = partial(train_step, alone)
        new = archipelago.train_step(recipe.islands, one, state, batch, due, ends)
        return dataclasses.replace(new, ema=_averaged(recipe, state, new.params))
    (new, grads, updates), metrics = _update(recipe, state, batch)

    def measured(grads, updates):
        return {name: (norm, jnp.ones(())) for name, norm in _norms(grads, updates).items()}

    def skipped(grads, updates):
        return jax.tree.map(
            lambda n: (jnp.zeros(()), jnp.zeros(())), jax.eval_shape(_norms, grads, updates)
        )

    norms = jax.lax.cond(due, measured, skipped, grads, updates)
    return dataclasses.replace(new, metrics=add_metrics(state.metrics, {**metrics, **norms}))


def _update(recipe: Recipe, state: TrainState, batch: Batch):
    """Returns ((the next state with the old metrics, gradient, update), metrics of this step)."""
    augmentation_key, model_key = step_keys(state.seed, state.step)
    raw, mixed = batch, learners.mix(recipe.learner, state, batch)
    mixed = mixed._replace(batch=recipe.augment(augmentation_key, mixed.batch))
    scale = state.loss_scale.scale if recipe.scale_loss else 1.0
    grads, model_state, metrics, loss, output = gradient(recipe, state, mixed, model_key, scale)

    def value_fn(trained):
        return _objective(recipe, trained, state, state.model_state, mixed, model_key, 1.0)[0]

    updates, optimizer_state = recipe.optimizer.update(
        grads,
        state.optimizer_state,
        state.params,
        value=loss,
        grad=grads,
        value_fn=value_fn,
        metrics=metrics,
    )
    params = optax.apply_updates(state.params, updates)
    scale_state = state.loss_scale
    if recipe.scale_loss:
        finite = loss_scale.all_finite(grads)
        after = (params, optimizer_state, model_state)
        before = (state.params, state.optimizer_state, state.model_state)
        params, optimizer_state, model_state = loss_scale.keep(finite, after, before)
        scale_state = loss_scale.update(state.loss_scale, finite)
        metrics = {**metrics, "loss_scale": (scale_state.scale, jnp.ones(()))}
    metrics = {
        **metrics,
        "learning_rate": (recipe.learning_rate(state.step, optimizer_state), jnp.ones(())),
    }
    first_bad = (state.nonfinite_step < 0) & ~jnp.isfinite(loss)
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        model_state=model_state,
        optimizer_state=optimizer_state,
        ema=_averaged(recipe, state, params),
        loss_scale=scale_state,
        nonfinite_step=jnp.where(first_bad, state.step, state.nonfinite_step),
    )
    new = learners.finish_step(recipe.learner, state, new, grads, mixed, raw, output)
    return (new, grads, updates), metrics


def _averaged(recipe: Recipe, state: TrainState, params: Any) -> Any:
    """Returns the average after a step from `state` to `params`."""
    if recipe.averaging is None:
        return state.ema
    return recipe.averaging.update(state.ema, params, state.step + 1)


def forward(recipe: Recipe, trained: Any, state: TrainState, batch: Batch) -> Output:
    """Returns the model's output in evaluation mode, for other trained parameters."""
    params = recipe.parameters.combine(trained, state.frozen)
    arguments, options = recipe.task.inputs(batch)
    with placement.use(recipe.placement):
        return recipe.model.apply(params, state.model_state, *arguments, train=False, **options)[0]


def _objective(recipe, trained, state, model_state, mixed, key, scale, mean=True):
    """Returns (loss times `scale`, (model state, metrics, loss, weight, output)), mean or sum."""
    learner, batch = recipe.learner, mixed.batch
    params = recipe.parameters.combine(trained, state.frozen)
    arguments, options = recipe.task.inputs(batch)
    with placement.use(recipe.placement):
        output, new_model_state = recipe.model.apply(
            params, model_state, *arguments, train=True, key=key, **options
        )
    own, moment = learners.own_of(state), learners.moment_of(state)
    masked = learner.output(own, output, mixed, moment)
    losses, weights = recipe.task.loss(masked, batch)
    total, weight = jnp.sum(losses * weights), jnp.sum(weights)
    loss = total / _nonzero(weight) if mean else total
    other = lambda trained, rows: forward(recipe, trained, state, rows)
    loss = learner.loss(loss, own, trained, mixed, output, moment, other)
    rows, shown = learners.stream_rows(mixed, masked)
    answer = None if learner is learners.PLAIN else output
    return loss * scale, (new_model_state, recipe.task.metrics(shown, rows), loss, weight, answer)


_differentiated = jax.value_and_grad(_objective, argnums=1, has_aux=True)


def gradient(recipe: Recipe, state: TrainState, mixed: Mixed, key: jax.Array, scale):
    """Returns (gradient of the mean loss, model state, metrics, mean loss, a learner's output)."""
    if recipe.accumulation > 1:
        return _accumulated(recipe, state, mixed, key, scale)
    (_, (model_state, metrics, loss, _, output)), grads = _differentiated(
        recipe, state.params, state, state.model_state, mixed, key, scale
    )
    grads = _unscaled(grads, scale)
    if recipe.learner is not learners.PLAIN:
        own, moment = learners.own_of(state), learners.moment_of(state)
        plain = recipe._replace(learner=learners.PLAIN)

        def gradient_of(rows: Batch) -> Any:
            alone = Mixed(normalise(dict(rows)), {})
            arguments = (plain, state.params, state, state.model_state, alone, key)
            return _differentiated(*arguments, 1.0)[1]

        memory = learners.memory_of(state)
        grads = recipe.learner.gradient(grads, own, state.params, gradient_of, moment, memory)
    return grads, model_state, metrics, loss, output


def _accumulated(recipe: Recipe, state: TrainState, mixed: Mixed, key: jax.Array, scale):
    """As `gradient`, from parts of the batch that go through the model one after another."""
    parts = recipe.accumulation
    # Part i takes the rows i, i + parts, ...: each stays on the device that has it.
    cut = lambda a: jnp.moveaxis(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 1, 0)
    batches = jax.tree.map(cut, mixed.batch)
    rows = jax.tree.leaves(batches)[0].shape[1]

    def measured(params: Any, batch: Any) -> Metrics:
        _, (_, metrics, *_) = _objective(
            recipe, params, state, state.model_state, Mixed(batch, {}), key, scale
        )
        return metrics

    def part(carry, i_and_batch):
        i, batch = i_and_batch
        grads, model_state, metrics, total, weight = carry
        (_, (model_state, new_metrics, loss, new_weight, _)), new = _differentiated(
            recipe,
            state.params,
            state,
            model_state,
            Mixed(batch, {}),
            jax.random.fold_in(key, i),
            scale / rows,  # about the size of a mean's gradient: float16 has no room for a sum's
            mean=False,
        )
        grads = jax.tree.map(jnp.add, grads, new)
        metrics = add_metrics(metrics, new_metrics)
        return (grads, model_state, metrics, total + loss, weight + new_weight), None

    abstract = jax.eval_shape(measured, state.params, jax.tree.map(lambda a: a[0], batches))
    none = jnp.zeros(())
    start = (
        jax.tree.map(jnp.zeros_like, state.params),
        state.model_state,
        zero_metrics(abstract),
        none,
        none,
    )
    (grads, model_state, metrics, total, weight), _ = jax.lax.scan(
        part, start, (jnp.arange(parts), batches)
    )
    weight = _nonzero(weight)
    return _unscaled(grads, scale / rows * weight), model_state, metrics, total / weight, None


def _unscaled(grads: Any, scale: Any) -> Any:
    if isinstance(scale, float) and scale == 1.0:
        return grads
    return jax.tree.map(lambda g: g / scale, grads)


def _nonzero(weight: jax.Array) -> jax.Array:
    """Returns the weight, or 1 where there is none: the sum above it is 0 then."""
    return jnp.where(weight > 0, weight, 1.0)


def _norms(grads: Any, updates: Any) -> dict[str, jax.Array]:
    """Returns the global norms of gradient and update, and those of each top-level group."""
    norms = {}
    for name, tree in (("gradient_norm", grads), ("update_norm", updates)):
        groups = {group: optax.tree.norm(leaves, squared=True) for group, leaves in tree.items()}
        norms[name] = jnp.sqrt(sum(groups.values(), jnp.zeros(())))
        if len(groups) > 1:
            norms |= {f"{name}/{group}": jnp.sqrt(square) for group, square in groups.items()}
    return norms
