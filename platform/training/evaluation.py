"""Evaluation of a split: each example counts exactly once, whatever the mesh."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lamina.platform import config as configs
from lamina.platform.data import feed as feeds
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import UserError
from lamina.platform.training import compiled, evaluation_step, experiment, seeds, settings
from lamina.platform.training import rows as placing
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.state import Metrics, TrainState
from lamina.sharding import mesh as meshes
from lamina.sharding import rules as partition_rules

STREAMED_BATCHES = 16
"""Batches in one dispatch where the split isn't held on the device: enough to hide the dispatch,
few enough to hold in memory."""


class Evaluator(NamedTuple):
    """One split to evaluate.

    Attributes:
        name: the split's name in the records.
        every: steps between evaluations; 0: at the end only.
        feed: its batches.
        program: sums the metrics of `length` batches.
        length: batches in one call.
        rows: what the feed reads for a call, as `jax.ShapeDtypeStruct`s with shardings.
        zeros: the metrics' empty sums.
        bytes_per_token: of text, or None.
    """

    name: str
    every: int
    feed: feeds.Feed
    program: compiled.Program
    length: int
    rows: Any
    zeros: Metrics
    bytes_per_token: float | None = None


class Evaluated(NamedTuple):
    """A split that the config evaluates, not opened yet.

    Attributes:
        name: the split's name in the records.
        every: steps between evaluations; 0: at the end only.
        dataset: whose split.
        split: its name in the data set.
        batch_size: examples at once.
        data: the block with `placement` and `workers`.
    """

    name: str
    every: int
    dataset: Dataset
    split: str
    batch_size: int
    data: Any


def choose(parts: Experiment) -> list[Evaluated]:
    """Returns what the config evaluates, in the order of the records.

    They are the splits `validation` and `test` (where the data set has them) and the config's own
    `evaluators`.

    Raises:
        UserError: an evaluator's block is wrong, its data don't fit the model, or the config
            selects by a metric that isn't measured.
    """
    c = parts.config
    batch_size = c.evaluation.batch_size or c.data.batch_size
    chosen = [
        Evaluated(name, every, parts.dataset, name, batch_size, c.data)
        for name, every in (("validation", c.evaluation.every), ("test", 0))
        if name in parts.dataset.splits
    ]
    for name, block in c.evaluators.items():
        chosen.append(_own(parts, name, block, batch_size))
    ways = meshes.batch_parallelism(parts.mesh)
    for entry in chosen:
        if entry.batch_size < 1 or entry.batch_size % ways:
            raise UserError(
                f"{entry.name} is evaluated in batches of {entry.batch_size}, which don't divide "
                f"by {ways}, into which the mesh splits a batch: set evaluation.batch_size"
            )
    measured = metric_names(parts, chosen)
    for key, metric in (
        ("checkpoint.best", c.checkpoint.best),
        ("early_stopping.metric", c.early_stopping.metric),
    ):
        if metric and metric not in measured:
            raise UserError(f"{key} = {metric!r} isn't measured: one of {', '.join(measured)}")
    return chosen


def metric_names(parts: Experiment, chosen: Sequence[Evaluated]) -> list[str]:
    """Returns `split/metric` of all that is measured for selection, without computing anything."""
    sums = abstract_sums(parts)
    return [
        f"{entry.name}/{name}"
        for entry in chosen
        if entry.name != "test"
        for name in finished(parts, sums, entry.dataset.bytes_per_token.get(entry.split))
    ]


def abstract_sums(parts: Experiment) -> dict[str, tuple[float, float]]:
    """Returns the names of the sums that an evaluation makes, each with some (sum, weight)."""
    recipe = parts.recipe

    def one(batch: Any) -> Any:
        params, model_state = recipe.model.init(jax.random.key(0))
        return evaluation_step.evaluate_batch(recipe, params, model_state, batch)

    return dict.fromkeys(jax.eval_shape(one, parts.batch), (1.0, 1.0))


def finished(
    parts: Experiment, sums: Mapping[str, Any], bytes_per_token: float | None = None
) -> dict[str, float]:
    """Returns the metrics of one model: sum / weight, without those that have no weight.

    Args:
        parts: the run's parts.
        sums: name to (sum, weight), on the host.
        bytes_per_token: of text, for metrics per byte.
    """
    means = {name: float(s) / float(weight) for name, (s, weight) in sums.items() if weight > 0}
    return parts.recipe.task.finish(means, bytes_per_token)


def open_evaluators(parts: Experiment, chosen: Sequence[Evaluated]) -> list[Evaluator]:
    """Opens the feeds of all that is evaluated, and compiles their programs.

    Args:
        parts: the run's parts.
        chosen: as `choose` returns it.
    """
    return [_open(parts, *entry) for entry in chosen]


class _OwnEvaluator(NamedTuple):
    every: int = 0
    split: str = "test"
    batch_size: int = 0


def _own(parts: Experiment, name: str, block: Any, batch_size: int) -> Evaluated:
    if not isinstance(block, Mapping) and not hasattr(block, "items"):
        raise UserError(f"evaluators.{name} should be a block: dict(data=dict(...), every=...)")
    schema = configs.Schema(
        _OwnEvaluator, {}, {"data": experiment.SCHEMA.kinds["data"]._replace(shared=_OwnData)}
    )
    try:
        resolved = configs.resolve(block, schema, parts.trust)
    except UserError as error:
        raise UserError(f"evaluators.{name}: {error}") from error
    dataset = experiment.open_dataset(resolved.data, parts.trust)
    if resolved.split not in dataset.splits:
        raise UserError(
            f"evaluators.{name}.split = {resolved.split!r}: the data set has "
            + ", ".join(dataset.splits)
        )
    if dataset.spec != parts.dataset.spec:
        raise UserError(
            f"evaluators.{name}: its data ({dataset.spec}) differ from the training data's "
            f"({parts.dataset.spec})"
        )
    size = resolved.batch_size or batch_size
    return Evaluated(name, resolved.every, dataset, resolved.split, size, resolved.data)


class _OwnData(NamedTuple):
    placement: str = settings.Data._field_defaults["placement"]
    workers: int = 0


def _open(parts: Experiment, name, every, dataset: Dataset, split, batch_size, data) -> Evaluator:
    feed = feeds.evaluation_feed(
        dataset.splits[split],
        batch_size,
        placement=data.placement,
        workers=data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        sharding=partition_rules.replicated(parts.mesh),
    )
    length = feed.steps if feed.constants else min(feed.steps, STREAMED_BATCHES)
    rows = placing.abstract_rows(parts, feed.read(0, length), per_seed=False)
    shapes = compiled.evaluation_totals(parts, feed, rows)
    zeros = jax.tree.map(lambda s: jax.device_put(jnp.zeros(s.shape, s.dtype), s.sharding), shapes)
    program = compiled.evaluation_program(parts, feed, rows, shapes)
    bytes_per_token = dataset.bytes_per_token.get(split)
    return Evaluator(name, every, feed, program, length, rows, zeros, bytes_per_token)


def evaluate(parts: Experiment, evaluator: Evaluator, state: TrainState) -> list[dict[str, float]]:
    """Returns the split's metrics for each seed.

    Args:
        parts: the run's parts.
        evaluator: what to evaluate.
        state: of all seeds; it is not changed.
    """
    totals = evaluator.zeros
    for first in range(0, evaluator.feed.steps, evaluator.length):
        placed = placing.put(evaluator.feed.read(first, evaluator.length), evaluator.rows)
        totals = evaluator.program.call(totals, state, evaluator.feed.constants, placed)
    return means(parts, jax.device_get(totals), evaluator.bytes_per_token)


def means(
    parts: Experiment, totals: Any, bytes_per_token: float | None = None
) -> list[dict[str, float]]:
    """Returns sum / weight of each metric for each seed; one without any weight is left out.

    Args:
        parts: the run's parts.
        totals: name to (sum, weight), on the host, with the seed axis if there are several seeds.
        bytes_per_token: of text, for metrics per byte.
    """
    number = parts.seeds.number
    return [finished(parts, seeds.take(totals, number, i), bytes_per_token) for i in range(number)]
