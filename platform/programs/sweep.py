"""The program `sweep`: many trials of a training experiment, in as few programs as possible.

Trials are grouped by what has to be compiled: numbers that can be arrays of the program don't need
another one. A group is run in units, each of which is saved as a whole: a sweep that was killed
goes on in the unit that it was in, from that unit's checkpoint, with the same numbers. Selection
reads the validation split; the test split is left to the run of `best.json`.
"""

import contextlib
import os
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
from lamina.platform.reporting.clock import Clock
from lamina.platform.sweeps import lanes, members, planning, results, searching, space
from lamina.platform.sweeps.planning import Group, Shape, Trial
from lamina.platform.training import compiled, evaluation, experiment, loading
from lamina.platform.training import settings as training_settings
from lamina.platform.training.experiment import Experiment
from lamina.sharding import rules as partition_rules

FREE = (
    "checkpoint.every",
    "checkpoint.keep",
    "data.placement",
    "data.workers",
    "trackers",
    "tracker_options",
)
"""Keys that may change between two sessions of a sweep: they don't change what is computed."""

UNITS = "units"
SHAPES = "shapes.json"


class Prepared(NamedTuple):
    """A sweep before its folder exists.

    Attributes:
        parts: of the experiment itself, without the sweep.
        domains: the search space.
        trials: all of them; of Optuna's none, which are asked for as the sweep goes.
        groups: of the trials.
        metric: of the selection.
        mode: "max" or "min".
        loaded: what isn't drawn.
        config: resolved.
        trust: packages whose factories the config may name.
        devices: the devices to use.
    """

    parts: Experiment
    domains: Sequence[space.Domain]
    trials: Sequence[Trial]
    groups: Sequence[Group]
    metric: str
    mode: str
    loaded: loading.Loaded
    config: FrozenConfigDict
    trust: Sequence[str]
    devices: Any


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
    base = planning.make_trial(0, {}, config, trust)
    parts = experiment.assemble(base.config, trust, devices, dataset)
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
    metric, mode = selection(parts)(s.metric, s.mode)
    whole = partition_rules.replicated(parts.mesh)
    loaded = loading.load(base.config, trust, parts.recipe.model, whole)
    prepared = Prepared(parts, domains, trials, (), metric, mode, loaded, config, trust, devices)
    return prepared._replace(groups=grouped(prepared, trials))


def describe(config: FrozenConfigDict, trust: Sequence[str], dataset: Dataset) -> list[str]:
    """Returns what `lamina check` says of a sweep: its trials, and what is compiled for them."""
    prepared = prepare(config, trust, None, True, dataset)
    seeds, s = len(config.seeds), config.sweep
    if s.method == "optuna":
        return [f"{s.trials} trials of {seeds} seeds, asked of Optuna {s.round} at a time"]
    lines = [
        f"{len(prepared.trials)} trials of {seeds} seeds ({s.method}) in "
        f"{len(prepared.groups)} programs; the best by the {prepared.mode}imum of {prepared.metric}"
    ]
    for group in prepared.groups:
        own = {k: v for k, v in group.trials[0].values.items() if k not in group.hyper}
        fixed = ", ".join(f"{key} = {value!r}" for key, value in own.items())
        arrays = ", ".join(group.hyper) or "none"
        lines.append(f"  {len(group.trials)} trials, {fixed or 'all alike'}; as arrays: {arrays}")
    return lines


def selection(parts: Experiment):
    """Returns `(metric, mode) -> (metric, mode)`, with defaults filled in.

    Raises:
        UserError: (by the function) the metric isn't measured.
    """
    chosen = [entry for entry in evaluation.choose(parts) if entry.name != "test"]
    measured = evaluation.metric_names(parts, chosen)

    def choose(metric: str, mode: str) -> tuple[str, str]:
        own, own_mode = parts.recipe.task.select
        if not metric:
            return f"validation/{own}", own_mode if mode == "auto" else mode
        if metric not in measured:
            raise UserError(
                f"sweep.metric = {metric!r} isn't measured: one of {', '.join(measured)}"
            )
        return metric, training_settings.better(metric, mode)

    return choose


def grouped(prepared: Prepared, trials: Sequence[Trial]) -> list[Group]:
    """Returns the trials by what has to be compiled."""
    dataset = lambda trial: dataset_of(prepared, trial)
    for trial in trials:
        try:
            experiment.check_factories(trial.config, prepared.trust, prepared.parts)
        except UserError as error:
            raise UserError(f"{planning.describe(trial.number, trial.values)}: {error}") from error
    tried = lambda trial, keys: planning.traceable(
        trial, keys, prepared.trust, prepared.devices, dataset(trial)
    )
    found = planning.group(trials, tried)
    for group in found:
        if not group.hyper:  # nothing was tried: what is wrong shall show now
            first = group.trials[0].config
            experiment.assemble(first, prepared.trust, prepared.devices, dataset(group.trials[0]))
    return found


def dataset_of(prepared: Prepared, trial: Trial) -> Dataset:
    """Returns the data set of a trial: that of the experiment, unless it varies the data."""
    if trial.config.data == prepared.parts.config.data:
        return prepared.parts.dataset
    different = configs.difference(
        configs.thaw(prepared.parts.config.data), configs.thaw(trial.config.data)
    )
    if set(different) <= set(training_settings.Data._fields):
        return prepared.parts.dataset  # another batch size or order of the same data
    return experiment.open_dataset(trial.config.data, prepared.trust)


def forbidden_changes(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """Returns the differences between two configs that forbid the new one to go on."""
    differences = configs.difference(old, new)
    free = lambda key: any(key == name or key.startswith(f"{name}.") for name in FREE)
    return {key: values for key, values in differences.items() if not free(key)}


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
    clock = Clock()
    if prepared.loaded.report:
        context.say(f"{prepared.config.init_from}: {prepared.loaded.report}")
    programs = set()
    with contextlib.ExitStack() as stack:
        known, built = None, None
        for group in rounds(prepared, rows):
            shape = shape_of(prepared, group, workdir)
            key = (planning.rest_of(group.trials[0], group.hyper), group.hyper, shape[2:])
            programs.add(key)
            todo = [
                unit
                for unit in planning.units(group, shape.trials)
                if any(trial.number not in rows for trial in unit)
            ]
            if not todo:
                continue
            if built is None or key != known:  # Optuna's rounds come back to the same program
                stack.pop_all().close()
                with clock.phase("compile"):
                    data = dataset_of(prepared, group.trials[0])
                    built = lanes.compile_group(
                        group, shape, prepared.trust, prepared.devices, data
                    )
                known = key
                stack.callback(built.close)
            for unit in todo:
                with clock.phase("train"):
                    rows |= run_unit(prepared, built._replace(shape=shape), unit, context)
                results.write(workdir, rows)
                say_unit(prepared, unit, rows, context)
    return Outcome(finish(prepared, rows, len(programs), clock, workdir))


def rounds(prepared: Prepared, rows: Mapping[int, results.Row]) -> Iterator[Group]:
    """Yields the groups to run; Optuna's once the rounds before them are in `rows`."""
    s = prepared.config.sweep
    if s.method != "optuna":
        yield from prepared.groups
        return
    told: list[tuple[Mapping[str, Any], float | None]] = []
    while len(told) < s.trials:
        count = min(s.round, s.trials - len(told))
        points = searching.ask(prepared.domains, told, count, s.seed, prepared.mode)
        first = len(told)
        make = partial(planning.make_trial, config=prepared.config, trust=prepared.trust)
        trials = [make(first + i, values) for i, values in enumerate(points)]
        yield from grouped(prepared, trials)
        told += [(t.values, rows[t.number]["score"]) for t in trials]


def tuples(data: Any) -> Any:
    """Returns what JSON has made lists of as the tuples that a config holds."""
    if isinstance(data, Mapping):
        return {key: tuples(value) for key, value in data.items()}
    return tuple(map(tuples, data)) if isinstance(data, list | tuple) else data


def shape_of(prepared: Prepared, group: Group, workdir: str) -> Shape:
    """Returns how a group is run; a sweep that goes on does so in the same way, on any machine."""
    path = os.path.join(workdir, UNITS, SHAPES)
    known = storage.read_object(path)
    name = str(group.trials[0].number)
    if name not in known:
        parts, c = prepared.parts, group.trials[0].config
        device = parts.mesh.devices.flat[0]
        wanted = len(group.trials) * len(c.seeds)
        fitting = members.at_once(parts, members.memory(device), wanted)
        limit = min(fitting, c_limit) if (c_limit := prepared.config.sweep.at_once) else fitting
        shape = planning.shape(
            len(group.trials),
            len(c.seeds),
            platform=device.platform,
            devices=parts.mesh.size,
            seed_parallelism=parts.mesh.shape["seed"],
            cores=lanes.cores(),
            steps_per_call=c.steps_per_call,
            at_once=limit,
        )
        known[name] = shape._asdict()
        storage.write_json(path, known)
    return Shape(**known[name])


def run_unit(
    prepared: Prepared, built: lanes.Compiled, unit: Sequence[Trial], context: Context
) -> dict[int, results.Row]:
    """Runs a unit, writes its trials' folders, and returns their rows."""
    path = os.path.join(context.workdir, UNITS, str(unit[0].number))
    finished = members.run(built, unit, path, prepared.loaded, context.stop)
    found = results.of_unit(finished, prepared.metric)
    for trial, ended, row in found:
        results.write_trial(context.workdir, trial, ended, row)
    return {trial.number: row for trial, _, row in found}


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
    programs: int,
    clock: Clock,
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
        best["trial"], tuples(best["values"]), prepared.config, prepared.trust
    )
    path = storage.as_path(workdir) / results.BEST
    storage.write_text(path, configs.to_json(trial.config))
    totals = clock.totals()
    return storage.plain(
        {
            "final": best["final"],
            "metric": prepared.metric,
            "mode": prepared.mode,
            "best": {"trial": best["trial"], "score": best["score"], **best["values"]},
            **results.summary(rows, prepared.mode),
            "programs": programs,
            "seconds": sum(row["seconds"] for row in rows.values()),
            "compile_seconds": totals.get("compile", 0.0),
            "steps": prepared.parts.steps,
            "table": order,
        }
    )
