"""What may be wrong between keys of a training config whose types are right."""

import math
from collections.abc import Iterator, Mapping

from ml_collections import FrozenConfigDict


def find(c: FrozenConfigDict) -> Iterator[str]:
    """Yields what is wrong between keys whose types are right."""
    yield from _extent(c)
    if c.steps_per_call < 1:
        yield f"steps_per_call = {c.steps_per_call} should be at least 1"
        return
    yield from _cadences(c)
    yield from _batches(c)
    yield from averages(c)
    yield from _numbers(c)
    yield from _selection(c)
    yield from _names(c)


def _extent(c: FrozenConfigDict) -> Iterator[str]:
    """Yields what is wrong with the steps and the seeds."""
    if bool(c.steps) == bool(c.epochs):
        yield f"give either steps or epochs (steps = {c.steps}, epochs = {c.epochs})"
    if c.steps < 0 or c.epochs < 0:
        yield f"steps = {c.steps} and epochs = {c.epochs} should not be negative"
    if not c.seeds:
        yield "seeds is empty: give at least one value, such as (0,)"
    if len(set(c.seeds)) != len(c.seeds):
        yield f"seeds = {c.seeds} holds a value twice"
    if any(not 0 <= s < 2**32 for s in c.seeds):
        yield f"seeds = {c.seeds}: values lie between 0 and 2**32 - 1"


def _cadences(c: FrozenConfigDict) -> Iterator[str]:
    """Yields what would be due between two dispatches."""
    if c.log_every < 1:
        yield f"log_every = {c.log_every} should be at least 1"
    cadences = {
        "log_every": c.log_every,
        "evaluation.every": c.evaluation.every,
        "checkpoint.every": c.checkpoint.every,
    } | {
        f"evaluators.{name}.every": evaluator.get("every", 0)
        for name, evaluator in c.evaluators.items()
        if isinstance(evaluator, Mapping | FrozenConfigDict)
    }
    for key, value in cadences.items():
        if not isinstance(value, int) or value < 0:
            yield f"{key} = {value!r} should be a number of steps, or 0"
        elif value % c.steps_per_call:
            lower = value - value % c.steps_per_call or c.steps_per_call
            yield (
                f"{key} = {value} is no multiple of steps_per_call = {c.steps_per_call}: what is "
                f"due between dispatches only can't happen there; use {lower} or another multiple"
            )


def _batches(c: FrozenConfigDict) -> Iterator[str]:
    if c.data.batch_size < 1:
        yield f"data.batch_size = {c.data.batch_size} should be at least 1"
    elif c.accumulation < 1 or c.data.batch_size % c.accumulation:
        yield (
            f"accumulation = {c.accumulation} should divide data.batch_size = {c.data.batch_size}"
        )
    if not 0 <= c.data.balance_length < math.inf:
        yield f"data.balance_length = {c.data.balance_length} should be 0 or more"
    if c.evaluation.batch_size < 0:
        yield f"evaluation.batch_size = {c.evaluation.batch_size} should not be negative"


def _numbers(c: FrozenConfigDict) -> Iterator[str]:
    """Yields single numbers that lie outside their range."""
    if not 0 <= c.optimizer.learning_rate < math.inf:
        yield f"optimizer.learning_rate = {c.optimizer.learning_rate} should be 0 or more"
    if c.clip_norm < 0:
        yield f"clip_norm = {c.clip_norm} should not be negative"
    if c.checkpoint.keep < 1:
        yield f"checkpoint.keep = {c.checkpoint.keep} should be at least 1"
    if c.debug.check_nans and c.steps_per_call != 1:
        yield "debug.check_nans needs steps_per_call = 1: it can't look into a loop"
    if c.early_stopping.patience < 1:
        yield f"early_stopping.patience = {c.early_stopping.patience} should be at least 1"


def _selection(c: FrozenConfigDict) -> Iterator[str]:
    """Yields what keeps a metric from choosing a checkpoint or the end of a run."""
    for key, metric in (
        ("early_stopping.metric", c.early_stopping.metric),
        ("checkpoint.best", c.checkpoint.best),
    ):
        split = metric.partition("/")[0]
        every = _evaluated_every(c, split)
        if metric and not every:
            yield f"{key} = {metric!r} is measured at the end only: set evaluation.every"
        elif key == "checkpoint.best" and metric and c.checkpoint.every % every:
            yield (
                f"checkpoint.every = {c.checkpoint.every} is no multiple of {every}, the steps "
                f"between evaluations: checkpoints would be saved where {metric} isn't known"
            )
        if metric.startswith("test/"):
            yield f"{key} = {metric!r}: the test split isn't for selection, use validation/..."


def _names(c: FrozenConfigDict) -> Iterator[str]:
    """Yields names of evaluators, of loaded parameters and of mesh axes that can't be."""
    for name in c.evaluators:
        if name in ("train", "validation", "test", "record", "checkpoint"):
            yield f"evaluators.{name}: {name!r} is taken, choose another name"
    rules = c.init_from_rules
    if not c.init_from and (rules.include or rules.exclude or rules.rename):
        yield "init_from_rules.include, exclude and rename need init_from"
    asked = {f"axes.{axis}": names for axis, names in c.sharding.axes.items()}
    asked |= {f"activations.{axis}": names for axis, names in c.sharding.activations.items()}
    asked |= {f"paths {pattern!r}": names for pattern, each in c.sharding.paths for names in each}
    for key, names in asked.items():
        each = names if isinstance(names, tuple) else (names,)
        if not all(isinstance(name, str) for name in each):
            yield f"sharding.{key}: {names!r} should be a mesh axis, a tuple of them, or ''"


def averages(c: FrozenConfigDict) -> Iterator[str]:
    """Yields what is wrong with the averages of the parameters."""
    if not 0 <= c.ema.decay < 1:
        yield f"ema.decay = {c.ema.decay} should lie in [0, 1)"
    for key, value in (("swa.start", c.swa.start), ("swa.every", c.swa.every)):
        if value < 0:
            yield f"{key} = {value} should be a number of steps, or 0"
    if c.lawa.every < 0 or c.lawa.latest < 1:
        yield (
            f"lawa.every = {c.lawa.every} should be a number of steps, or 0, and lawa.latest = "
            f"{c.lawa.latest} at least 1"
        )
    kept = {"ema.decay": c.ema.decay, "swa.every": c.swa.every, "lawa.every": c.lawa.every}
    chosen = [f"{key} = {value}" for key, value in kept.items() if value]
    if len(chosen) > 1:
        yield f"{' and '.join(chosen)}: evaluation takes one average, set the others to 0"
    if c.swa.every and c.steps and c.swa.start + c.swa.every > c.steps:
        yield (
            f"swa.start = {c.swa.start} and swa.every = {c.swa.every}: nothing is averaged within "
            f"steps = {c.steps}"
        )
    if c.lawa.every and c.steps and c.lawa.every > c.steps:
        yield f"lawa.every = {c.lawa.every}: nothing is averaged within steps = {c.steps}"


def _evaluated_every(c: FrozenConfigDict, split: str) -> int:
    """Returns the steps between evaluations of a split or of one of the config's evaluators."""
    own = c.evaluators.get(split)
    every = own.get("every", 0) if hasattr(own, "get") else c.evaluation.every
    return every if isinstance(every, int) else 0
