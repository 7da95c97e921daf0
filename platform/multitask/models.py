"""The models of several tasks as parts that are merged and parts that each keeps.

Letters: T tasks, S steps, B examples of a task in a step.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamina.models import placement
from lamina.platform import config as configs
from lamina.platform.checkpoints import exchange, names
from lamina.platform.checkpoints import weights as weights_files
from lamina.platform.data import batches, order
from lamina.platform.data import feed as feeds
from lamina.platform.errors import UserError
from lamina.platform.merging import fisher, grams, learned
from lamina.platform.training import evaluation, evaluation_step, layout, trained
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.step import Recipe
from lamina.platform.training.tasks import Task

Flat = dict[str, jax.Array]
ROWS_AT_ONCE = 64
"""Examples of one forward pass whose Gram matrices are summed."""


class Weights(NamedTuple):
    """The parameters of one model, by path.

    Attributes:
        body: what is merged.
        own: what its task keeps.
        state: what it keeps besides parameters, such as batch statistics.
    """

    body: Flat
    own: Flat
    state: Any


def read(path: str, own: Sequence[str], seed: int | None, trust: Sequence[str]) -> Weights:
    """Reads a run's parameters.

    Args:
        path: the run folder.
        own: regular expressions of what isn't merged.
        seed: which of its seeds; default: the first.
        trust: packages whose factories its config may name.

    Raises:
        UserError: there is no such run or seed, or it is damaged.
    """
    found = trained.read(path, seed=seed, trust=trust)
    return split(names.flatten(found.params), own, found.model_state)


def read_base(path: str, own: Sequence[str], trust: Sequence[str]) -> Weights:
    """Reads the parameters of a run (of its first seed) or of a safetensors file."""
    if not weights_files.is_weights(path):
        return read(path, own, None, trust)
    params, state = weights_files.divided(exchange.import_tensors(path, finite=True).arrays)
    array = lambda tensor: jnp.asarray(np.asarray(tensor))
    flat = {name: array(tensor) for name, tensor in params.items()}
    return split(flat, own, names.nest({name: array(tensor) for name, tensor in state.items()}))


def metric_names(parts: Experiment) -> list[str]:
    """Returns the names of the metrics of a task, without computing anything."""
    bytes_per_token = parts.dataset.bytes_per_token.get("validation")
    return list(evaluation.finished(parts, evaluation.abstract_sums(parts), bytes_per_token))


def split(flat: Mapping[str, jax.Array], own: Sequence[str], state: Any = None) -> Weights:
    """Divides parameters by path into what is merged and what isn't."""
    kept = {path for path in flat if any(re.search(pattern, path) for pattern in own)}
    body = {path: leaf for path, leaf in flat.items() if path not in kept}
    return Weights(body, {path: flat[path] for path in kept}, state or {})


def check_fit(bodies: Mapping[str, Weights]) -> None:
    """Checks that the bodies of models can be merged.

    Raises:
        UserError: one has a leaf that another has not, or of another shape.
    """
    (first, reference), *others = bodies.items()
    for name, weights in others:
        for path in {**reference.body, **weights.body}:
            one, other = reference.body.get(path), weights.body.get(path)
            if one is None or other is None or one.shape != other.shape:
                shapes = [None if leaf is None else leaf.shape for leaf in (one, other)]
                raise UserError(
                    f"{path!r} is {shapes[0]} in {first} and {shapes[1]} in {name} (None: not "
                    "there): such models can't be merged, unless merge.own keeps this path apart"
                )


def axes_of(parts: Experiment, body: Flat) -> Any:
    """Returns the logical axes of the merged part, as a tree of its paths."""
    found = layout.flat(parts.recipe.model.axes)
    return names.nest({path: found[path] for path in body})


def signature(parts: Experiment) -> str:
    """Returns a text that tasks share whose models and losses are computed alike."""
    c = parts.config
    return repr((configs.thaw(c.model), configs.thaw(c.task), parts.dataset.spec, c.precision))


def average_states(states: Sequence[Any]) -> Any:
    """Returns the mean of what models keep besides parameters (counts are the first's)."""
    mean = lambda *leaves: (
        sum(leaves[1:], leaves[0]) / len(leaves)
        if jnp.issubdtype(leaves[0].dtype, jnp.floating)
        else leaves[0]
    )
    return jax.tree.map(mean, *states)


@functools.partial(jax.jit, static_argnums=0)
def _metrics(recipe: "_Static", body: Flat, own: Flat, state: Any, batch: Any) -> Any:
    params = names.nest({**body, **own})
    return evaluation_step.evaluate_batch(recipe.recipe, params, state, batch)


class _Static:
    """A recipe as a static argument: tasks of one signature share a program."""

    def __init__(self, parts: Experiment):
        self.recipe: Recipe = parts.recipe
        self._key = signature(parts), str(parts.mesh)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key


def evaluate(parts: Experiment, split_name: str, weights: Weights) -> dict[str, float]:
    """Returns the metrics of a model on a split of its task."""
    c = parts.config
    feed = feeds.evaluation_feed(
        parts.dataset.splits[split_name],
        c.evaluation.batch_size or c.data.batch_size,
        placement=c.data.placement,
        workers=c.data.workers,
    )
    static, totals = _Static(parts), None
    try:
        for number in range(feed.steps):
            row = jax.tree.map(lambda leaf: leaf[0], feed.read(number, 1))
            batch = feed.select(feed.constants, row)
            sums = _metrics(static, weights.body, weights.own, weights.state, batch)
            totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    finally:
        feed.close()
    bytes_per_token = parts.dataset.bytes_per_token.get(split_name)
    return evaluation.finished(parts, jax.device_get(totals), bytes_per_token)


def statistics_of(
    parts: Experiment, weights: Weights, kind: str, number: int, labels: fisher.Labels, seed: int
) -> Any:
    """Returns what a data-based merger needs of a task's model, from its training split.

    Args:
        parts: of the task.
        weights: its model.
        kind: "fishers" or "grams".
        number: how many examples; all of a smaller split.
        labels: of the Fisher information.
        seed: of the choice of examples and of the draws.

    Returns:
        A tree like the body, or path to Gram matrix.
    """
    source = parts.dataset.splits["train"]
    chosen = order.permutation(len(source), seed, 0)[: min(number, len(source))]
    batch = feeds.normalise(jax.tree.map(jnp.asarray, batches.fetch(source, chosen)))
    key = jax.random.key(seed)
    return _gather(_Static(parts), weights, batch, key, kind, labels)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _gather(
    static: _Static, weights: Weights, batch: Any, key: jax.Array, kind: str, labels: Any
) -> Any:
    recipe, (body, own, state) = static.recipe, weights

    def logits(body: Flat, rows: Any) -> jax.Array:
        arguments, options = recipe.task.inputs(rows)
        params = names.nest({**body, **own})
        with placement.use(recipe.placement):
            output, _ = recipe.model.apply(params, state, *arguments, train=False, **options)
        return output.logits

    if kind == "fishers":
        targets = batch["labels"]
        return fisher.diagonal(logits, body, batch, targets, key, kind=labels)
    return grams.collect(logits, body, fisher.chunked(batch, ROWS_AT_ONCE))


class Learning:
    """The losses of learned merges over all tasks, and their batches.

    Tasks whose models are computed alike go through one vectorised pass.

    Args:
        tasks: their parts.
    """

    def __init__(self, tasks: Mapping[str, Experiment]):
        self._groups: dict[str, list[str]] = {}
        for name, parts in tasks.items():
            self._groups.setdefault(signature(parts), []).append(name)
        self._tasks = tasks

    def batches(self, split_name: str, steps: int, size: int, seed: int, labels: bool) -> Any:
        """Returns for each group the examples [S, T, B, ...] of all steps, or inputs alone."""
        found = {}
        for group in self._groups.values():
            rows = []
            for name in group:
                source = self._tasks[name].dataset.splits[split_name]
                chosen = order.indices(len(source), seed, 0, steps * size)
                taken = batches.fetch(source, chosen)
                if not labels:
                    taken.pop("labels")
                rows.append({k: v.reshape(steps, size, *v.shape[1:]) for k, v in taken.items()})
            found[group[0]] = {k: np.stack([row[k] for row in rows], 1) for k in rows[0]}
        return found

    def held(self, weights: Mapping[str, Weights]) -> Any:
        """Returns for each group what its tasks keep, stacked."""
        stack = lambda *leaves: jnp.stack(leaves)
        return {
            group[0]: jax.tree.map(
                stack, *[(weights[name].own, weights[name].state) for name in group]
            )
            for group in self._groups.values()
        }

    def entropy(self, body: Any, batch: Any, held: Any) -> jax.Array:
        """Returns the mean over tasks of the mean entropy of the predictions, in nats."""
        return self._mean(
            lambda task, output, rows: learned.entropy(output.logits), body, batch, held
        )

    def labelled(self, body: Any, batch: Any, held: Any) -> jax.Array:
        """Returns the mean over tasks of the task's own loss."""
        return self._mean(lambda task, output, rows: task.loss(output, rows)[0], body, batch, held)

    def _mean(
        self, losses: Callable[[Task, Any, Any], jax.Array], body: Any, batch: Any, held: Any
    ) -> jax.Array:
        total = jnp.zeros((), jnp.float32)
        flat = names.flatten(body)
        for group in self._groups.values():
            recipe = self._tasks[group[0]].recipe

            def one(kept: Any, rows: Any, recipe: Recipe = recipe) -> jax.Array:
                (own, state), rows = kept, feeds.normalise(rows)
                arguments, options = recipe.task.inputs(rows)
                params = names.nest({**flat, **own})
                output, _ = recipe.model.apply(params, state, *arguments, train=False, **options)
                return losses(recipe.task, output, rows).mean()

            with placement.use(recipe.placement):
                total += jax.vmap(one)(held[group[0]], batch[group[0]]).sum()
        return total / len(self._tasks)
