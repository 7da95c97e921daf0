"""The program `sweep`: many trials of a training experiment, in as few programs as possible.

Trials are grouped by what has to be compiled: numbers that can be arrays of the program don't need
another one. A group is run in units, each of which is saved as a whole: a sweep that was killed
goes on in the unit that it was in, from that unit's checkpoint, with the same numbers. Selection
reads the validation split; the test split is left to the run of `best.json`.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import DivergedError, UserError
from lamina.platform.programs.context import Context, Outcome
from lamina.platform.reporting import folder, formats, storage
from lamina.platform.sweeps import groups, planning, results, searching, space
from lamina.platform.sweeps.planning import Group, Trial
from lamina.platform.training import compiled, experiment, loading
from lamina.platform.training.experiment import Experiment
from lamina.sharding import rules as partition_rules


class Prepared(NamedTuple):
    """A sweep before its folder exists.

    Attributes:
        parts: of the experiment itself, without the sweep.
        base: what the trials have in common.
        domains: the search space.
        trials: all of them; of Optuna's none, which are asked for as the sweep goes.
        grouped: the trials by what has to be compiled.
        metric: of the selection.
        mode: "max" or "min".
        config: resolved.
    """

    parts: Experiment
    base: groups.Base
    domains: Sequence[space.Domain]
    trials: Sequence[Trial]
    grouped: Sequence[Group]
    metric: str
    mode: str
    config: FrozenConfigDict


def prepare(
    config: FrozenConfigDict,
    trust: Sequence[str],
    devices: Sequence[jax.Device] | None,
    fresh: bool,
    dataset: Dataset | None = None,
) -> Prepared:
    """Plans the trials, and finds out which of them can share a program.

    Raises:
        UserError: a trial's config doesn't fit the data, the devices, or itself.
    """
    del fresh
    if jax.process_count() > 1:
        raise UserError("a sweep runs in one process: start one for each part of the space")
    plain = planning.make_trial(0, {}, config, trust).config
    parts = experiment.assemble(plain, trust, devices, dataset)
    domains, _ = space.read(config.sweep.space, config)
    s = config.sweep
    points: list[dict[str, Any]] = []
    if s.method == "grid":
        points = space.grid(domains)
    elif s.method != "optuna":
        points = space.draw(domains, s.trials, s.seed, s.method)
    else:
        searching.ask(domains, (), 1, s.seed, "max")  # whether it is there
    trials = [planning.make_trial(i, v, config, trust) for i, v in enumerate(points)]
    metric, mode = groups.selection(parts, "sweep.metric")(s.metric, s.mode)
    whole = partition_rules.replicated(parts.mesh)
    loaded = loading.load(plain, trust, parts.recipe.model, whole)
    base = groups.Base(parts, loaded, trust, devices, s.at_once)
    return Prepared(parts, base, domains, trials, groups.find(base, trials), metric, mode, config)


def describe(config: FrozenConfigDict, trust: Sequence[str], dataset: Dataset) -> list[str]:
    """Returns what `lamina check` says of a sweep: its trials, and what is compiled for them."""
    prepared = prepare(config, trust, None, True, dataset)
    seeds, s = len(config.seeds), config.sweep
    if s.method == "optuna":
        return [f"{s.trials} trials of {seeds} seeds, asked of Optuna {s.round} at a time"]
    lines = [
        f"{len(prepared.trials)} trials of {seeds} seeds ({s.method}) in "
        f"{len(prepared.grouped)} programs; "
        f"the best by the {prepared.mode}imum of {prepared.metric}"
    ]
    for group in prepared.grouped:
        own = {k: v for k, v in group.trials[0].values.items() if k not in group.hyper}
        fixed = ", ".join(f"{key} = {value!r}" for key, value in own.items())
        arrays = ", ".join(group.hyper) or "none"
        lines.append(f"  {len(group.trials)} trials, {fixed or 'all alike'}; as arrays: {arrays}")
    return lines


def sweep(prepared: Prepared, context: Context) -> Outcome:
    """Runs all trials that the folder has no results of.

    Args:
        prepared: the plan.
        context: the run folder and what else a program is given.

    Raises:
        DivergedError: no trial is left.
        InterruptedRun: a signal asked to stop.
    """
    workdir = context.workdir
    folder.write_parameters(workdir, compiled.parameter_rows(prepared.parts))
    rows = results.read(workdir)
    if prepared.base.loaded.report:
        context.say(f"{prepared.config.init_from}: {prepared.base.loaded.report}")
    # Optuna's rounds come back to the same program.
    with groups.Programs(prepared.base) as programs:
        for group in rounds(prepared, rows):
            shape = groups.shape_of(prepared.base, group, workdir)
            programs.note(group, shape)
            for unit in planning.units(group, shape.trials):
                if all(trial.number in rows for trial in unit):
                    continue
                finished = groups.run_unit(programs, group, shape, unit, workdir, context.stop)
                for trial, ended, row in results.of_unit(finished, prepared.metric):
                    results.write_trial(results.folder_of(workdir, trial), trial, ended, row)
                    rows[trial.number] = row
                results.write(workdir, rows)
                say_unit(prepared, unit, rows, context)
        return Outcome(finish(prepared, rows, programs, workdir))


def rounds(prepared: Prepared, rows: Mapping[int, results.Row]) -> Iterator[Group]:
    """Yields the groups to run; Optuna's once the rounds before them are in `rows`."""
    s = prepared.config.sweep
    if s.method != "optuna":
        yield from prepared.grouped
        return
    told: list[tuple[Mapping[str, Any], float | None]] = []
    while len(told) < s.trials:
        count = min(s.round, s.trials - len(told))
        points = searching.ask(prepared.domains, told, count, s.seed, prepared.mode)
        first = len(told)
        make = partial(planning.make_trial, config=prepared.config, trust=prepared.base.trust)
        trials = [make(first + i, values) for i, values in enumerate(points)]
        yield from groups.find(prepared.base, trials)
        told += [(t.values, rows[t.number]["score"]) for t in trials]


def tuples(data: Any) -> Any:
    """Returns what JSON has made lists of as the tuples that a config holds."""
    if isinstance(data, Mapping):
        return {key: tuples(value) for key, value in data.items()}
    return tuple(map(tuples, data)) if isinstance(data, list | tuple) else data


def say_unit(prepared: Prepared, unit: Sequence[Trial], rows: Mapping, context: Context) -> None:
    """Tells how far the sweep is."""
    best = results.ranked(rows.values(), prepared.mode)[0]
    lost = [t.number for t in unit if rows[t.number]["state"] == "diverged"]
    total = prepared.config.sweep.trials or len(prepared.trials)
    text = f"trials {unit[0].number} to {unit[-1].number}: {len(rows)} of {total} done"
    if best["score"] is not None:
        score = formats.number(best["score"])
        text += f"; best {prepared.metric} {score} (trial {best['trial']})"
    context.say(text + (f"; diverged: {', '.join(map(str, lost))}" if lost else ""))


def finish(
    prepared: Prepared,
    rows: Mapping[int, results.Row],
    programs: groups.Programs,
    workdir: str,
) -> dict[str, Any]:
    """Chooses the best trial, writes `best.json`, and returns the result.

    Raises:
        DivergedError: all trials have diverged.
    """
    order = results.ranked(rows.values(), prepared.mode)
    best = order[0]
    if best["score"] is None:
        raise DivergedError(
            f"all {len(rows)} trials diverged, or never had a finite {prepared.metric}: see "
            f"{results.TABLE}; search smaller learning rates"
        )
    trial = planning.make_trial(
        best["trial"], tuples(best["values"]), prepared.config, prepared.base.trust
    )
    path = storage.as_path(workdir) / results.BEST
    storage.write_text(path, configs.to_json(trial.config))
    return storage.plain(
        {
            "final": best["final"],
            "metric": prepared.metric,
            "mode": prepared.mode,
            "best": {"trial": best["trial"], "score": best["score"], **best["values"]},
            **results.summary(rows, prepared.mode),
            "programs": len(programs.seen),
            "seconds": sum(row["seconds"] for row in rows.values()),
            "compile_seconds": programs.seconds,
            "steps": prepared.parts.steps,
            "table": order,
        }
    )
