"""What a shoot-out needs of a program so that workloads can be of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from lamina.platform.config import Schema
from lamina.platform.sweeps.members import Ended
from lamina.platform.sweeps.planning import Trial


class Runs(NamedTuple):
    """How the trials of an optimizer on a workload are run.

    Attributes:
        measure: `(trials, study)` to the members of each trial, by its number; trials that were
            begun go on, and those that are done aren't run again. Study None: of fresh seeds.
        seconds: what compiling has taken so far.
    """

    measure: Callable[[Sequence[Trial], int | None], Mapping[int, Sequence[Ended]]]
    seconds: Callable[[], float]


class Engine(NamedTuple):
    """A program whose runs can be workloads.

    Attributes:
        schema: the vocabulary of its configs.
        own: what its configs have in place of the shoot-out's, before a workload changes them.
        assemble: `(config, trust, devices, data set)` to the parts of a run.
        select: `(parts, key)` to `(metric, mode) -> (metric, mode)`, with defaults filled in; the
            key is where the config names the metric.
        open: `(pair, trust, devices, at_once, context)` to the `Runs` of a pair.
    """

    schema: Schema
    own: Mapping[str, Any]
    assemble: Callable[..., Any]
    select: Callable[[Any, str], Callable[[str, str], tuple[str, str]]]
    open: Callable[..., AbstractContextManager[Runs]]
