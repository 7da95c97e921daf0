"""The vocabulary of the `sweep` block."""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.sweeps import space
from lamina.platform.training import experiment

_EMPTY: Mapping[str, Any] = MappingProxyType({})


MOST = 10_000
"""Trials of a sweep: each is resolved, has a row in the table and a folder."""


class Sweep(NamedTuple):
    """The search: which config keys vary, over what, and what is best.

    Attributes:
        space: nested blocks like the config's own; at each key a tuple of values, or
            `dict(low=..., high=..., scale="log", points=...)`.
        method: "grid" takes every combination (of a range its `points`), "random" and "halton" draw
            `trials` points (Halton's leave smaller holes), "optuna" asks Optuna's TPE.
        trials: how many points are drawn; 0 with "grid".
        seed: of the draw.
        metric: of the validation split, by which the best trial is chosen; "" takes the task's.
        mode: whether the largest or the smallest value is best; "auto" as for `checkpoint.mode`.
        at_once: most (trial, seed) pairs trained at once; 0: all that fit in memory.
        round: trials that Optuna is asked for at a time.
    """

    space: Mapping[str, Any] = _EMPTY
    method: Literal["grid", "random", "halton", "optuna"] = "grid"
    trials: int = 0
    seed: int = 0
    metric: str = ""
    mode: Literal["auto", "max", "min"] = "auto"
    at_once: int = 0
    round: int = 8


def _contradictions(c: FrozenConfigDict) -> Iterable[str]:
    yield from experiment.SCHEMA.contradictions(c)
    s = c.sweep
    domains, problems = space.read(s.space, c)
    yield from problems
    if s.method == "grid":
        if s.trials:
            yield f"sweep.trials = {s.trials}: a grid has as many trials as its values give, set 0"
        for domain in domains:
            if not domain.values and not domain.points:
                yield f"sweep.space.{domain.key}: a grid needs points, how many values it takes"
        count = math.prod(len(domain.values) or domain.points for domain in domains)
        if count > MOST:
            yield f"sweep.space has {count} points, a sweep at most {MOST} trials: take fewer"
    elif not 1 <= s.trials <= MOST:
        yield (
            f"sweep.trials = {s.trials} should be between 1 and {MOST} for method = {s.method!r}"
        )
    if s.at_once < 0 or s.round < 1:
        yield f"sweep.at_once = {s.at_once} should be 0 or more, and round = {s.round} 1 or more"
    if not 0 <= s.seed < 2**32:
        yield f"sweep.seed = {s.seed} should lie between 0 and 2**32 - 1"
    if s.metric.startswith("test/"):
        yield f"sweep.metric = {s.metric!r}: the test split isn't for selection, use validation/..."
    yield from not_for_trials(c, "a sweep")


def not_for_trials(c: FrozenConfigDict, program: str) -> Iterable[str]:
    """Yields what a config asks for that trials beside each other can't have."""
    if c.early_stopping.metric:
        yield f"early_stopping isn't for {program}: all trials get the same number of steps"
    if c.checkpoint.best:
        yield f"checkpoint.best isn't for {program}: trials are compared where they end"
    if c.debug.check_nans or c.debug.overfit_one_batch:
        yield f"debug isn't for {program}: run a trial of it alone"


SCHEMA = experiment.SCHEMA._replace(
    blocks={**experiment.SCHEMA.blocks, "sweep": Sweep}, contradictions=_contradictions
)
"""The vocabulary of a sweep: that of a training experiment, and the block `sweep`."""


def resolve(config: Any, trust: Any = configs.EVERYONE) -> FrozenConfigDict:
    """Returns the whole config of a sweep, checked.

    Raises:
        UserError: lists all mistakes.
    """
    return configs.resolve(config, SCHEMA, trust)
