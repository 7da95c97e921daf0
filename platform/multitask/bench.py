"""Merges the models of several tasks, scores them on all, and keeps each score as a cell."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform import config as configs
from lamina.platform.merging import statistics
from lamina.platform.merging.mergers import Merger
from lamina.platform.multitask import cells, models, rounds
from lamina.platform.multitask.cells import Cell
from lamina.platform.reporting import storage
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.signals import StopRequest

STATISTICS = "statistics"

LINEAR_IN_SCALE = ("dare", "dare_l1", "iso_c", "task_arithmetic", "ties", "ties_per_tensor")
"""Methods that give `B + scale (M - B)` with the same M for every scale: a grid of scales merges
once. It differs from merging each by a rounding."""


class Given(NamedTuple):
    """What is the same for all seeds.

    Attributes:
        workdir: the run folder.
        stop: whether a signal has asked the run to stop.
        trust: packages whose factories the runs' configs may name.
        merge: the config's block.
        tasks: task to the parts with which its model is evaluated.
        paths: seed to where its trained models are.
        learning: the losses of learned merges.
        merger: a point's items to its merger; one that is kept is compiled once.
        metric: by which models are compared.
        mode: "max" or "min".
    """

    workdir: str
    stop: StopRequest
    trust: Sequence[str]
    merge: Any
    tasks: Mapping[str, Experiment]
    paths: Mapping[int, rounds.Paths]
    learning: models.Learning
    merger: Callable[[tuple[tuple[str, Any], ...]], Merger]
    metric: str
    mode: str


def unscaled(point: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a point without its scale, where that only stretches what is merged without."""
    linear = point["name"] in LINEAR_IN_SCALE
    return {key: value for key, value in point.items() if not (linear and key == "scale")}


@jax.jit
def _scaled(base: models.Flat, body: models.Flat, scale: Any) -> models.Flat:
    """Returns `base + scale (body - base)`."""
    stretch = lambda b, m: (
        (b + scale * (m - b)).astype(b.dtype) if jnp.issubdtype(b.dtype, jnp.floating) else b
    )
    return jax.tree.map(stretch, base, body)


class Bench:
    """Merges the models of one seed, which are read when the first cell needs them.

    Args:
        given: what is the same for all seeds.
        seed: whose models.
    """

    def __init__(self, given: Given, seed: int):
        self._given, self._seed = given, seed
        self._statistics: dict[str, list[Any]] = {}
        self._unscaled: tuple[dict[str, Any], models.Flat] | None = None

    @functools.cached_property
    def _models(self) -> rounds.Models:
        given = self._given
        return rounds.read(given.paths[self._seed], given.merge.own, self._seed, given.trust)

    def reference(self, name: str) -> Cell:
        """Returns the cell of the models as they were trained, or of the base with their heads."""

        def compute() -> Cell:
            body, _, found = self._models
            if name == "pretrained":
                found = {task: weights._replace(body=body) for task, weights in found.items()}
            return Cell(self._score(found, ("validation", "test")))

        return self._cell(name, "reference", {}, compute)

    def point(self, name: str, number: int, point: Mapping[str, Any]) -> Cell:
        """Returns the cell of a grid's point, scored on validation."""
        compute = lambda: self._merged(point, ("validation",))
        return self._cell(name, f"point{number}", point, compute)

    def chosen(self, name: str, point: Mapping[str, Any]) -> Cell:
        """Returns the cell of a method's chosen point, scored on test too."""
        compute = lambda: self._merged(point, ("validation", "test"))
        return self._cell(name, "chosen", point, compute)

    def _merged(self, point: Mapping[str, Any], splits: Sequence[str]) -> Cell:
        _, base, found = self._models
        merger = self._given.merger(tuple(sorted(unscaled(point).items())))
        m, tasks = self._given.merge, list(found)
        given: dict[str, Any] = {}
        if merger.needs in ("fishers", "grams"):
            given = {merger.needs: self._gathered(merger.needs)}
        learning, labels = self._given.learning, merger.needs == "labeled"
        learns = merger.needs in ("labeled", "unlabeled")
        if learns:
            batches = learning.batches(m.unlabeled, m.steps, m.batch_size, self._seed, labels)
            given = {"batches": batches, "held": learning.held(found)}
        size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        held = (len(tasks) + 2) * size(base) + size(given)
        if learns:
            given["loss"] = learning.labelled if labels else learning.entropy
        if merger.needs == "score":
            given["score"] = self._validation_score
        bodies = [found[task].body for task in tasks]
        axes = models.axes_of(next(iter(self._given.tasks.values())), base)
        begin = time.monotonic()
        learned = merger.fit(bodies, base=base, axes=axes, **given) if merger.fit else None
        if learned is not None:
            body = learned.params
        elif self._unscaled and self._unscaled[0] == unscaled(point):
            body = self._unscaled[1]
        else:
            body = merger(bodies, base=base, axes=axes, **given)
            self._unscaled = (unscaled(point), body)
        if point["name"] in LINEAR_IN_SCALE:
            body = _scaled(base, body, point.get("scale", 1.0))
        jax.block_until_ready(body)
        seconds = time.monotonic() - begin
        state = models.average_states([found[task].state for task in tasks])
        whole = {task: models.Weights(body, found[task].own, state) for task in tasks}
        cell = Cell(self._score(whole, splits), seconds, held)
        if learned is None:
            return cell
        kept = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), learned.coefficients)
        losses = cells.thinned(jax.device_get(learned.losses))
        return cell._replace(coefficients=kept, losses=losses)

    def _validation_score(self, body: models.Flat) -> float:
        """Returns the mean over tasks of the metric on validation, negative where less is better.

        Tasks that are one and the same, as the candidates of a soup are, are evaluated once. Batch
        statistics are the mean of all models'.
        """
        found = self._models.tasks
        state = models.average_states([weights.state for weights in found.values()])
        known: dict[Any, float] = {}
        scores = []
        for name, parts in self._given.tasks.items():
            own = found[name].own
            data = configs.thaw(parts.config.data)
            key = name if own else (models.signature(parts), repr(data))
            if key not in known:
                weights = models.Weights(body, own, state)
                known[key] = models.evaluate(parts, "validation", weights)[self._given.metric]
            scores.append(known[key])
        return float(np.mean(scores)) * (1 if self._given.mode == "max" else -1)

    def _gathered(self, kind: str) -> list[Any]:
        """Returns the statistics of all tasks' models, from their files where there are some."""
        if kind not in self._statistics:
            m, made = self._given.merge, []
            for number, (name, weights) in enumerate(self._models.tasks.items()):
                file = f"{name}_seed{self._seed}.safetensors"
                path = storage.as_path(self._given.workdir) / STATISTICS / kind / file
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    parts, draw = self._given.tasks[name], self._seed + number
                    tree = models.statistics_of(parts, weights, kind, m.examples, m.fisher, draw)
                    facts = {"examples": str(m.examples), "labels": m.fisher, "task": name}
                    statistics.save(path, tree, kind, facts)
                like = weights.body if kind == "fishers" else None
                made.append(statistics.load(path, kind, like))
            self._statistics[kind] = made
        return self._statistics[kind]

    def _score(self, weights: Mapping[str, models.Weights], splits: Sequence[str]) -> Any:
        tasks = self._given.tasks
        return {
            split: {name: models.evaluate(tasks[name], split, w) for name, w in weights.items()}
            for split in splits
        }

    def _cell(
        self, name: str, what: str, point: Mapping[str, Any], compute: Callable[[], Cell]
    ) -> Cell:
        """Returns a cell from its file, or computes and writes it."""
        path = cells.path_of(self._given.workdir, name, what, self._seed)
        known = cells.read(path, point)
        if known is not None:
            return known
        self._given.stop.before(f"{name}, seed {self._seed}")
        cell = compute()
        cells.write(path, point, cell)
        return cell
