"""The programs by name: `config.program` selects one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lamina.platform.config import Schema
from lamina.platform.errors import UserError
from lamina.platform.multitask import settings as multitask
from lamina.platform.programs import (
    benchmark,
    incremental,
    lr_finder,
    merge_tasks,
    rebasin,
    shootout,
    sweep,
    train,
)
from lamina.platform.sweeps import groups, rivals, settings
from lamina.platform.training import experiment


class Program(NamedTuple):
    """One kind of experiment.

    Attributes:
        schema: the vocabulary of its configs.
        resolve: `(config, trust)` to the whole config, checked.
        prepare: `(config, trust, devices, fresh)` to the parts of the run; it computes and writes
            nothing, so that what is wrong is found before there is a run folder.
        run: `(parts, context)` to an `Outcome`.
        changes: `(old config, new config)` to the differences that forbid to resume.
        describe: `(config, trust, data set)` to what `lamina check` says besides.
        is_whole: `(parts, run folder)` to whether a finished run still has all of its cells: where
            one was removed, the same command runs it again.
    """

    schema: Schema
    resolve: Callable[..., Any]
    prepare: Callable[..., Any]
    run: Callable[..., Any]
    changes: Callable[..., Mapping[str, tuple[Any, Any]]]
    describe: Callable[..., Sequence[str]] = lambda config, trust, dataset: ()
    is_whole: Callable[[Any, str], bool] = lambda parts, workdir: True


PROGRAMS: Mapping[str, Program] = {
    "benchmark": Program(
        benchmark.SCHEMA,
        benchmark.resolve,
        benchmark.prepare,
        benchmark.run,
        incremental.forbidden_changes,
        benchmark.describe,
        benchmark.is_whole,
    ),
    "incremental": Program(
        incremental.SCHEMA,
        incremental.resolve,
        incremental.prepare,
        incremental.run,
        incremental.forbidden_changes,
    ),
    "lr_finder": Program(
        lr_finder.SCHEMA,
        lr_finder.resolve,
        lr_finder.prepare,
        lr_finder.find,
        lr_finder.forbidden_changes,
    ),
    "merge": Program(
        multitask.SCHEMA,
        multitask.resolve,
        merge_tasks.prepare,
        merge_tasks.run,
        merge_tasks.forbidden_changes,
        merge_tasks.describe,
    ),
    "rebasin": Program(
        rebasin.SCHEMA,
        rebasin.resolve,
        rebasin.prepare,
        rebasin.run,
        rebasin.forbidden_changes,
        rebasin.describe,
    ),
    "train": Program(
        experiment.SCHEMA,
        experiment.resolve,
        train.prepare,
        train.train,
        train.forbidden_changes,
    ),
    "shootout": Program(
        rivals.SCHEMA,
        rivals.resolve,
        shootout.prepare,
        shootout.shootout,
        groups.forbidden_changes,
        shootout.describe,
        shootout.is_whole,
    ),
    "sweep": Program(
        settings.SCHEMA,
        settings.resolve,
        sweep.prepare,
        sweep.sweep,
        groups.forbidden_changes,
        sweep.describe,
    ),
}
"""The explicit table of programs."""


def find(config: Mapping[str, Any]) -> Program:
    """Returns the program that `config.program` names (default: train).

    Raises:
        UserError: there is no such program.
    """
    name = config.get("program", "train")
    if name not in PROGRAMS:
        raise UserError(f"program = {name!r} is unknown: one of {', '.join(sorted(PROGRAMS))}")
    return PROGRAMS[name]
