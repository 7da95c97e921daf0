"""The evaluation step: sums of a task's metrics over batches, with the weights to evaluate."""

from collections.abc import Callable
from typing import Any

import jax

from lamina.models import placement
from lamina.platform.training.seeds import Seeds
from lamina.platform.training.state import Metrics, TrainState, add_metrics
from lamina.platform.training.step import Batch, Recipe, bound


def evaluate_chunk(
    recipe: Recipe,
    seeds: Seeds,
    select: Callable[[Any, Any], Batch],
    total: Metrics,
    state: TrainState,
    constants: Any,
    rows: Any,
) -> Metrics:
    """Returns `total` plus the metrics of the batches that `rows` select, with evaluation weights.

    Args:
        recipe: the step's functions.
        seeds: how several seeds are run.
        select: makes a batch of the feed's constants and one row.
        total: sums so far.
        state: of all seeds.
        constants: the feed's arrays on the devices.
        rows: for each batch, what the feed selects.
    """
    shared = seeds._replace(per_seed_rows=False)

    def weights_of(part: TrainState, _: Any) -> tuple[Any, Any, Any]:
        trained = evaluation_params(bound(recipe, part.hyper), part)
        params = recipe.parameters.combine(trained, part.frozen)
        return params, part.model_state, part.hyper

    weights = shared.lift(weights_of, "seed")(shared.split(state), None)

    def body(total_parts, row):
        batch = select(constants, row)
        carries = tuple(zip(total_parts, weights, strict=True))

        def one(carry, batch):
            total, (params, model_state, hyper) = carry
            own = bound(recipe, hyper)
            return add_metrics(total, evaluate_batch(own, params, model_state, batch))

        return shared.lift(one, "seed")(carries, batch), None

    parts, _ = jax.lax.scan(body, shared.split(total), rows)
    return shared.join(parts)


def evaluate_batch(recipe: Recipe, params: Any, model_state: Any, batch: Batch) -> Metrics:
    """Returns the sums of the metrics over one batch, with the model in evaluation mode."""
    arguments, options = recipe.task.inputs(batch)
    with placement.use(recipe.placement):
        output, _ = recipe.model.apply(params, model_state, *arguments, train=False, **options)
    return recipe.task.metrics(output, batch)


def evaluation_params(recipe: Recipe, state: TrainState) -> Any:
    """Returns the trained parameters to evaluate: their average, where one is kept."""
    if recipe.averaging is not None:
        return recipe.averaging.weights(state.ema, state.params, state.step)
    return recipe.optimizer_eval_params(state.optimizer_state, state.params)
