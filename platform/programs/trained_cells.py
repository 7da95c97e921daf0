"""Cells of a shoot-out whose workload is a training experiment: many trials in one program."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lamina.platform.errors import UserError
from lamina.platform.programs.context import Context
from lamina.platform.sweeps import cells, groups, planning, results
from lamina.platform.sweeps.engines import Engine, Runs
from lamina.platform.sweeps.members import Ended
from lamina.platform.sweeps.pairs import Pair
from lamina.platform.sweeps.planning import Group, Trial
from lamina.platform.training import experiment, loading
from lamina.platform.training.experiment import Experiment
from lamina.sharding import rules as partition_rules


def select(parts: Experiment, key: str) -> Callable[[str, str], tuple[str, str]]:
    """Returns `(metric, mode) -> (metric, mode)`: metrics of the validation split.

    Raises:
        UserError: nothing is evaluated; or (by the function) the metric isn't measured.
    """
    if not parts.config.evaluation.every:
        raise UserError("evaluation.every = 0 can't tell when a target is met")
    return groups.selection(parts, key)


@contextlib.contextmanager
def open_runs(
    pair: Pair, trust: Sequence[str], devices: Any, at_once: int, context: Context
) -> Iterator[Runs]:
    """Gives the runs of a pair, whose compiled programs live as long as the context manager.

    Args:
        pair: an optimizer on a workload.
        trust: packages whose factories the config may name.
        devices: the devices to use.
        at_once: most (trial, seed) pairs trained at once; 0: all that fit in memory.
        context: the run folder and what else a program is given.

    Raises:
        UserError: a trial's config is wrong.
    """
    whole = partition_rules.replicated(pair.parts.mesh)
    loaded = loading.load(pair.config, trust, pair.parts.recipe.model, whole)
    base = groups.Base(pair.parts, loaded, trust, devices, at_once)
    found = groups.find(base, [trial for study in pair.studies for trial in study])
    with groups.Programs(base, keep=len(found)) as programs:
        yield Runs(partial(measure, programs, found, pair, context), lambda: programs.seconds)


def measure(
    programs: groups.Programs,
    found: Sequence[Group],
    pair: Pair,
    context: Context,
    trials: Sequence[Trial],
    study: int | None,
) -> Mapping[int, Sequence[Ended]]:
    """Runs the trials of a cell.

    Args:
        programs: of the pair.
        found: the pair's trials by program.
        pair: whose cell.
        context: the run folder and what else a program is given.
        trials: of the cell.
        study: its number; None: fresh seeds.

    Raises:
        InterruptedRun: a signal asked to stop.
    """
    path = os.path.join(cells.folder_of(context.workdir, pair), cells.name_of(study))
    by_trial: dict[int, list[Ended]] = {}
    wanted = {trial.number: trial for trial in trials}
    for group in found:
        own = tuple(wanted[t.number] for t in group.trials if t.number in wanted)
        if not own:
            continue
        part = Group(own, group.hyper)
        shape = groups.shape_of(programs.base, part, path)
        for unit in planning.units(part, shape.trials):
            finished = groups.run_unit(programs, part, shape, unit, path, context.stop)
            for ended in finished.ended:
                by_trial.setdefault(ended.member.trial.number, []).append(ended)
            if study is None:
                _write_best(pair, finished, context)
    return by_trial


def _write_best(pair: Pair, finished: Any, context: Context) -> None:
    """Writes the run folder of a pair's best point, whose config runs again by itself."""
    path = cells.best_folder_of(context.workdir, pair)
    for trial, ended, row in results.of_unit(finished, pair.metric):
        results.write_trial(path, trial, ended, row)


ENGINE = Engine(experiment.SCHEMA, {}, experiment.assemble, select, open_runs)
"""The program `train` as shoot-outs see it."""
