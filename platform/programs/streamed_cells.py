"""Cells of a shoot-out whose workload is a stream: each trial is an incremental run of its own.

Of a stream, `average_accuracy` is the mean accuracy over all its tasks, those still to come
included. It is measured after every experience, and every `evaluation.every` steps besides: the
target is met at the first of these times. The scores of an incremental result, such as
`final_average_accuracy` or `forgetting`, are known when the stream has ended: who meets a target of
theirs has taken all steps of the stream, and optimizers differ by who meets it.

Trials run one after another, in folders of their own with their own checkpoints. Those of a study
that differ in numbers of the optimizer share a compiled program; the best point is an ordinary run.
"""

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import DivergedError, UserError
from lamina.platform.incremental import metrics
from lamina.platform.programs import incremental, stage
from lamina.platform.programs.context import Context, Outcome
from lamina.platform.reporting import folder, records, storage
from lamina.platform.sweeps import cells, groups, planning
from lamina.platform.sweeps.engines import Engine, Runs
from lamina.platform.sweeps.lanes import Member
from lamina.platform.sweeps.members import Ended
from lamina.platform.sweeps.pairs import Pair
from lamina.platform.sweeps.planning import Trial
from lamina.platform.training import compiled
from lamina.platform.training import settings as training_settings
from lamina.platform.training.experiment import Experiment

ACCURACY = "average_accuracy"
OWN = {"steps": 0, "epochs": 0.0, "stream": {"evaluate_on": "validation"}}
"""A stream decides its length; and the test split isn't for tuning."""


def assemble(
    config: FrozenConfigDict, trust: Sequence[str], devices: Any, dataset: Dataset
) -> Experiment:
    """Returns the parts of an incremental run.

    Raises:
        UserError: the learner, the stream, the data and the devices don't fit each other, or the
            stream is evaluated on the test split, or seeds are split over devices.
    """
    if config.stream.evaluate_on != "validation":
        raise UserError(
            f"stream.evaluate_on = {config.stream.evaluate_on!r}: the test split isn't for tuning, "
            "leave the key out, or use 'validation'"
        )
    parts = incremental.prepare(config, trust, devices, False, dataset).parts
    if parts.mesh.shape["seed"] > 1:
        raise UserError("mesh.seed: a stream's trials have one seed each, leave it at 1")
    return parts


def select(parts: Experiment, key: str) -> Callable[[str, str], tuple[str, str]]:
    """Returns `(metric, mode) -> (metric, mode)`: `average_accuracy`, or a score of the result.

    Raises:
        UserError: (by the function) there is no such metric.
    """
    del parts
    known = (ACCURACY, *metrics.METRICS)

    def choose(metric: str, mode: str) -> tuple[str, str]:
        metric = metric or ACCURACY
        if metric not in known:
            raise UserError(f"{key} = {metric!r} isn't measured: one of {', '.join(known)}")
        return metric, training_settings.better(metric, mode)

    return choose


@contextlib.contextmanager
def open_runs(
    pair: Pair, trust: Sequence[str], devices: Any, at_once: int, context: Context
) -> Iterator[Runs]:
    """Gives the runs of a pair.

    Args:
        pair: an optimizer on a workload.
        trust: packages whose factories the config may name.
        devices: the devices to use.
        at_once: is without meaning here: the seeds of one trial run together, and no more.
        context: the run folder and what else a program is given.

    Raises:
        UserError: a trial's config is wrong.
    """
    del at_once
    all_trials = [trial for study in pair.studies for trial in study]
    groups.check(all_trials, trust, pair.parts)

    def traceable(trial: Trial, keys: tuple[str, ...]) -> tuple[str, ...]:
        return planning.traceable(
            keys,
            lambda some: preparation(pair, trial, some)(trial.config, trust, devices, False).parts,
        )

    grouped = planning.group(all_trials, traceable)
    hyper = {trial.number: group.hyper for group in grouped for trial in group.trials}
    programs: dict[Any, compiled.Program] = {}
    compiling: list[float] = []

    def measure(trials: Sequence[Trial], study: int | None) -> Mapping[int, Sequence[Ended]]:
        found = {}
        for trial in trials:
            root = folder_of(context.workdir, pair, trial, study)
            if not is_over(root):
                # The state of the best point, which users restore, is that of an ordinary run.
                keys = hyper[trial.number] if study is not None else ()
                shared = (study, planning.rest_of(trial, keys))
                go = partial(incremental.run, compile_program=partial(once, programs, shared))
                prepare = preparation(pair, trial, keys)
                run_trial(root, pair, trial, devices, context, prepare, go)
                compiling.append((folder.read_result(root) or {}).get("compile_seconds", 0.0))
            found[trial.number] = ended(root, pair, trial)
        return found

    yield Runs(measure, lambda: sum(compiling))


def folder_of(workdir: str, pair: Pair, trial: Trial, study: int | None) -> str:
    """Returns the run folder of a trial; that of the fresh seeds is the best point's."""
    if study is None:
        return cells.best_folder_of(workdir, pair)
    own = os.path.join(cells.name_of(study), f"{trial.number:03d}")
    return os.path.join(cells.folder_of(workdir, pair), own)


def preparation(
    pair: Pair, trial: Trial, hyper: Sequence[str]
) -> Callable[..., incremental.Prepared]:
    """Returns the `prepare` of a trial's run, in which the values of some keys are arrays."""
    same_data = trial.config.data == pair.config.data
    return partial(
        incremental.prepare,
        dataset=pair.parts.dataset if same_data else None,
        hyper=planning.types_of(trial.config, hyper),
    )


def once(
    programs: dict[Any, compiled.Program], key: Any, jitted: Any, *arguments: Any
) -> compiled.Program:
    """Returns the program of a key, compiled if it isn't yet."""
    if key not in programs:
        programs[key] = compiled.compile_program(jitted, *arguments)
    return programs[key]


def is_over(root: str) -> bool:
    """Tells whether a trial has been run to its end, or has diverged."""
    over = folder.read_status(root)["state"] in ("done", "diverged")
    return over and folder.read_result(root) is not None


def run_trial(
    root: str,
    pair: Pair,
    trial: Trial,
    devices: Any,
    context: Context,
    prepare: Callable[..., incremental.Prepared],
    go: Callable[..., Outcome],
) -> None:
    """Runs a trial, or goes on with it; that all seeds have diverged is a result too.

    Args:
        root: its run folder.
        pair: whose trial.
        trial: which.
        devices: the devices to use.
        context: of the shoot-out.
        prepare: makes the parts of the run.
        go: runs them.

    Raises:
        InterruptedRun: a signal asked to stop.
    """
    context.stop.before(f"trial {trial.number} of {pair.optimizer} on {pair.workload}")
    c = FrozenConfigDict({**configs.thaw(trial.config), "trackers": ()})
    inner = context._replace(workdir=root, say=lambda text: None, console=False)
    try:
        stage.run(c, inner, devices, prepare, go)
    except DivergedError as error:
        steps = {str(seed): step for seed, step in error.steps.items()}
        folder.write_result(root, {"final": {}, "diverged": steps})


def ended(root: str, pair: Pair, trial: Trial) -> list[Ended]:
    """Returns what the seeds of a trial have measured, as its run folder tells it.

    A seed's numbers count until its loss isn't finite; of what comes later the value is None.

    Args:
        root: the run folder.
        pair: whose trial.
        trial: which.
    """
    result = folder.read_result(root)
    assert result is not None
    bad = {int(seed): step for seed, step in result["diverged"].items()}
    written = records.read(storage.as_path(root) / folder.METRICS)
    tasks: dict[tuple[int, int], list[float]] = {}
    for entry in written:
        if entry.name == "accuracy" and entry.split.startswith("task_") and entry.step:
            tasks.setdefault((entry.seed, entry.step), []).append(entry.value or 0.0)
    seeds = trial.config.seeds
    until = max((entry.time for entry in written), default=0.0)  # of a run without an end
    seconds = result["phases"].get("train", 0.0) if "phases" in result else until
    members = []
    for place, seed in enumerate(seeds):
        first_bad = bad.get(seed, -1)
        good = lambda step, first_bad=first_bad: first_bad < 0 or step < first_bad
        own = [
            records.record(step, "", ACCURACY, statistics.fmean(v) if good(step) else None, seed)
            for (of, step), v in sorted(tasks.items())
            if of == seed
        ]
        for name in metrics.METRICS:
            value = result["final"][name]["values"][place] if first_bad < 0 else None
            own.append(records.record(pair.parts.steps, "", name, value, seed))
        members.append(Ended(Member(trial, seed), own, first_bad, seconds / len(seeds)))
    return members


ENGINE = Engine(incremental.SCHEMA, OWN, assemble, select, open_runs)
"""The program `incremental` as shoot-outs see it."""
