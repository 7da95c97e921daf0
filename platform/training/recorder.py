"""What happens between dispatches: records, evaluation, checkpoints, and reasons to stop."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lamina.platform.checkpoints.failures import CheckpointError
from lamina.platform.checkpoints.store import Store
from lamina.platform.errors import DivergedError
from lamina.platform.reporting import records
from lamina.platform.reporting.clock import Clock
from lamina.platform.reporting.energy import Meter
from lamina.platform.reporting.protocol import Writer
from lamina.platform.training import (
    diagnosis,
    evaluation,
    layout,
    loop,
    settings,
    stragglers,
    trained,
)
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.loading import Loaded
from lamina.platform.training.state import TrainState


class Recorder:
    """Writes what a run measures and saves, and knows what was written before.

    Args:
        parts: the run's parts.
        loaded: what it started from.
        say: tells the user something that is no record.
        clock: seconds by phase.
        meter: joules.
        store: the checkpoints.
        log: the writers.
        history: records written so far.
        evaluators: the splits to evaluate.
        start: steps done before.

    Attributes:
        stragglers: compares the processes at each checkpoint.
    """

    def __init__(
        self,
        parts: Experiment,
        loaded: Loaded,
        say: Callable[[str], None],
        clock: Clock,
        meter: Meter,
        store: Store,
        log: Writer,
        history: Sequence[records.Record],
        evaluators: Sequence[evaluation.Evaluator],
        start: int,
    ):
        self.loaded = loaded
        self.parts, self.say, self.clock, self.meter = parts, say, clock, meter
        self.store, self.log, self.evaluators = store, log, evaluators
        self.history = list(history)
        self.done = {(r.step, r.split) for r in history}
        self.diverged: dict[int, int] = {}
        self.saved_step = -1
        self.stragglers = stragglers.Watch(clock, start)

    def write(self, step: int, split: str, by_seed: list[dict[str, float]]) -> None:
        """Writes one split's metrics of all seeds."""
        now = self.clock.elapsed()
        new = [
            records.record(step, split, name, value, seed, now)
            for seed, metrics in zip(self.parts.config.seeds, by_seed, strict=True)
            for name, value in metrics.items()
        ]
        self.log.write(new)
        self.history += new
        self.done.add((step, split))

    def evaluate(self, step: int, names: frozenset[str], state: TrainState) -> None:
        """Evaluates those splits of `names` that have no record of this step yet."""
        for evaluator in self.evaluators:
            if evaluator.name in names and (step, evaluator.name) not in self.done:
                with self.clock.phase("evaluate"):
                    metrics = evaluation.evaluate(self.parts, evaluator, state)
                self.write(step, evaluator.name, metrics)

    def save(self, step: int, state: TrainState, last: bool = False) -> None:
        """Saves a checkpoint; a disk that is full is reported, and the run goes on.

        Args:
            step: steps done.
            state: after them.
            last: whether this session ends here: then the checkpoint is waited for.

        Raises:
            CheckpointError: the last checkpoint can't be saved.
        """
        self.log.sync()
        if self.stragglers.look(step):
            self.say(self.stragglers.line)
        extra = {
            "clock": self.clock.totals(),
            "joules": self.meter.update(),
            "seeds": list(self.parts.config.seeds),
            "axes": {
                path: [a or "" for a in axes]
                for path, axes in layout.flat(self.parts.recipe.model.axes).items()
            },
            "spec": trained.describe_spec(self.parts.dataset.spec),
            "metrics": self.means_at(step),
        }
        with self.clock.phase("checkpoint"):
            for again in (True, False):  # an error may be that of the save before
                try:
                    if step != self.saved_step:
                        self.store.save(step, state, extra)
                        self.saved_step = step
                    if last:
                        self.store.wait()
                    return
                except CheckpointError as error:
                    self.saved_step = -1
                    if last and not again:
                        raise
                    self.say(str(error))

    def means_at(self, step: int) -> dict[str, float]:
        """Returns `split/name` to the mean over seeds of the metrics evaluated at `step`."""
        now = [r for r in self.history if r.step == step and r.split != "train"]
        means = {name: entry["mean"] for name, entry in records.summarise(now).items()}
        return {name: mean for name, mean in means.items() if mean is not None}

    def stops_early(self) -> bool:
        """Returns whether the metric of `early_stopping` has ceased to improve."""
        rule = self.parts.config.early_stopping
        if not rule.metric:
            return False
        split, _, name = rule.metric.partition("/")
        by_step: dict[int, list[float | None]] = {}
        for r in self.history:
            if r.split == split and r.name == name:
                by_step.setdefault(r.step, []).append(r.value)
        means = [records.summary(values).mean for _, values in sorted(by_step.items())]
        values = [math.nan if mean is None else mean for mean in means]
        return loop.should_stop(
            values, settings.better(rule.metric, rule.mode), rule.patience, rule.min_delta
        )

    def record(self, chunk: loop.Chunk, summary: Any) -> None:
        """Writes the training metrics of a chunk, and looks for divergence.

        Raises:
            DivergedError: as `check_divergence`.
        """
        host = jax.device_get(summary)
        names = jax.tree.structure(self.parts.state.metrics)
        metrics = evaluation.means(self.parts, jax.tree.unflatten(names, list(host["metrics"])))
        self.write(chunk.end, "train", metrics)
        self.check_divergence(host["nonfinite_step"])

    def check_divergence(self, nonfinite: np.ndarray) -> None:
        """Notes the seeds whose loss is no longer finite.

        Args:
            nonfinite: for each seed, the first step whose loss wasn't finite, or -1.

        Raises:
            DivergedError: no seed is left; the message names the step and the offending array.
        """
        seeds = self.parts.config.seeds
        for seed, bad in zip(seeds, np.atleast_1d(nonfinite), strict=True):
            if bad >= 0 and seed not in self.diverged:
                self.diverged[seed] = int(bad)
                self.say(f"seed {seed}: the loss of step {bad} is not finite")
        if len(self.diverged) == len(seeds):
            seed, bad = min(self.diverged.items(), key=lambda item: item[1])
            text = diagnosis.explain(self.parts, self.loaded, self.store, seed, bad)
            raise DivergedError(text, dict(self.diverged))
