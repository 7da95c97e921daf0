"""The program `merge`: trains models of several tasks, merges them by many methods, and compares.

The stages: train the base (or take one), fine-tune it for each task (or take runs), maybe in
rounds, each from the merge of the one before; then for each method and seed merge, choose the
grid's point on validation, and score that on test. Training stages are runs in sub-folders; every
merge that was scored is a cell, a small file. What is there isn't done again, so that a run that
was killed goes on in the stage or the cell that it was in, with the same numbers.
"""

import functools
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform import merging
from lamina.platform.checkpoints import names, transfer
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import UserError
from lamina.platform.merging.mergers import Merger
from lamina.platform.multitask import bench, cells, models, results, rounds, settings
from lamina.platform.multitask.cells import Cell
from lamina.platform.programs import stage
from lamina.platform.programs.context import Context, Outcome
from lamina.platform.reporting import folder, storage
from lamina.platform.training import compiled, experiment, trained
from lamina.platform.training import settings as training_settings
from lamina.platform.training.experiment import Experiment

FREE = ("trackers", "tracker_options", "data.workers", "data.placement")
"""Keys that may change between two sessions of a run: they don't change what is computed."""

TASKS = "tasks"


class Prepared(NamedTuple):
    """A merge of tasks before its folder exists.

    Attributes:
        parts: of the base's training, or of the first task.
        config: resolved.
        pretraining: the config of the base's training, or None where the base is given.
        finetunings: task to the config of its fine-tuning, or to the path of its run.
        tasks: task to the parts with which its model is evaluated.
        metric: by which points are chosen.
        mode: "max" or "min".
        trust: packages whose factories the config may name.
        devices: the devices to use.
    """

    parts: Experiment
    config: FrozenConfigDict
    pretraining: FrozenConfigDict | None
    finetunings: Mapping[str, Any]
    tasks: Mapping[str, Experiment]
    metric: str
    mode: str
    trust: Sequence[str]
    devices: Any


def prepare(
    config: FrozenConfigDict,
    trust: Sequence[str],
    devices: Sequence[jax.Device] | None,
    fresh: bool,
    dataset: Dataset | None = None,
) -> Prepared:
    """Builds the parts of every stage, so that what is wrong with one shows before the first.

    Raises:
        UserError: a stage's config doesn't fit its data or the devices, a run or the base isn't
            there, the models of two stages can't be merged, a pattern of `own` finds nothing, or
            the metric isn't measured.
    """
    del fresh
    if jax.process_count() > 1:
        raise UserError("a merge of tasks runs in one process")
    pretraining = settings.pretraining(config, trust)
    finetunings = dict(settings.finetunings(config, trust))
    tasks = {}
    for name, given in finetunings.items():
        try:
            own = trained.read_config(given, trust) if isinstance(given, str) else given
            tasks[name] = experiment.assemble(own, trust, devices)
            for split in ("validation", "test"):
                if split not in tasks[name].dataset.splits:
                    raise UserError(f"its data set has no {split} split")
            if config.merge.rounds > 1 and tasks[name].mesh.shape["seed"] > 1:
                raise UserError(
                    f"merge.rounds = {config.merge.rounds} trains one seed after the other, each "
                    "from its own merge: mesh.seed should be 1"
                )
        except UserError as error:
            raise UserError(f"merge.tasks.{name}: {error}") from error
    first = next(iter(tasks.values()))
    parts = experiment.assemble(pretraining, trust, devices, dataset) if pretraining else first
    bodies = {name: body_of(task, config) for name, task in tasks.items()}
    if pretraining:
        bodies["the base"] = body_of(parts, config)
    elif config.merge.base:
        bodies["the base"] = _read_base(config, trust)
    models.check_fit(bodies)
    # The default may find nothing in a model of the user's; what is given may not.
    given = sorted(set(config.merge.own) - set(settings.Merge._field_defaults["own"]))
    every = {path for found in bodies.values() for path in (*found.body, *found.own)}
    transfer.select(sorted(every), given, "merge.own")
    metric, mode = first.recipe.task.select
    if config.merge.metric:
        metric = config.merge.metric
        mode = training_settings.better(metric, "auto")
    for name, task in tasks.items():
        measured = models.metric_names(task)
        if metric not in measured:
            raise UserError(
                f"merge.metric = {metric!r} isn't measured in the task {name}: one of "
                + ", ".join(measured)
            )
    return Prepared(parts, config, pretraining, finetunings, tasks, metric, mode, trust, devices)


def _read_base(config: FrozenConfigDict, trust: Sequence[str]) -> models.Weights:
    try:
        return models.read_base(config.merge.base, config.merge.own, trust)
    except UserError as error:
        raise UserError(f"merge.base = {config.merge.base!r}: {error}") from error


def body_of(parts: Experiment, config: FrozenConfigDict) -> models.Weights:
    """Returns what of a stage's parameters is merged and what isn't, as shapes.

    Raises:
        UserError: nothing is left to merge.
    """
    found = models.split(names.flatten(parts.recipe.model.params), config.merge.own)
    if not found.body:
        raise UserError(f"merge.own = {config.merge.own} leaves no parameter to merge")
    return found


def forbidden_changes(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """Returns the differences between two configs that forbid the new one to go on.

    Methods may be added, taken away and changed: their cells are computed anew.
    """
    return configs.difference(old, new, (*FREE, "merge.methods"))


def describe(config: FrozenConfigDict, trust: Sequence[str], dataset: Dataset) -> list[str]:
    """Returns what `lamina check` says of a merge: its stages and its cells."""
    prepared = prepare(config, trust, None, True, dataset)
    m, seeds = config.merge, len(config.seeds)
    lines = []
    if prepared.pretraining:
        lines.append(f"base: {prepared.parts.steps} steps of its own ({settings.PRETRAINING}/)")
    else:
        lines.append(f"base: {m.base}")
    for name, task in prepared.tasks.items():
        given = prepared.finetunings[name]
        if isinstance(given, str):
            lines.append(f"task {name}: the run {given}")
        else:
            lines.append(f"task {name}: {task.steps} steps, {seeds} seeds ({TASKS}/{name}/)")
    if m.rounds > 1:
        lines.append(
            f"rounds 2 to {m.rounds}: every task and seed again, from the round before merged by "
            f"{m.between['name']} ({rounds.FOLDER}/ROUND/TASK_seedSEED/)"
        )
    own = ", ".join(sorted(body_of(prepared.parts, config).own))
    lines.append(f"each task keeps its own: {own or 'nothing, all parameters are merged'}")
    for name, block in m.methods.items():
        points = settings.points(block)
        needs = settings.bind(points[0]).needs
        data = {
            "fishers": f"; Fishers ({m.fisher}) of {m.examples} training examples a task",
            "grams": f"; Gram matrices of {m.examples} training examples a task",
            "unlabeled": f"; {m.steps} steps on {m.batch_size} unlabelled {m.unlabeled} inputs",
            "labeled": f"; {m.steps} steps on {m.batch_size} {m.unlabeled} examples of each task",
            "score": "; taken one by one, by the score on validation",
            "": "",
        }[needs]
        grid = f"{len(points)} points" if len(points) > 1 else "1 point"
        lines.append(f"method {name}: {block['name']}, {grid} x {seeds} seeds{data}")
    lines.append(f"chosen by the {prepared.mode}imum of validation/{prepared.metric}, over tasks")
    return lines


def run(prepared: Prepared, context: Context) -> Outcome:
    """Runs all stages and cells that the folder has no results of.

    Args:
        prepared: the parts.
        context: the run folder and what else a program is given.

    Raises:
        InterruptedRun: a signal asked to stop.
        DivergedError: a training stage diverged.
    """
    folder.write_parameters(context.workdir, compiled.parameter_rows(prepared.parts))
    begin = time.monotonic()
    paths = train_stages(prepared, context)
    training = time.monotonic() - begin
    methods = {n: settings.points(block) for n, block in prepared.config.merge.methods.items()}
    known: dict[str, list[Cell]] = {name: [] for name in (*settings.RESERVED, *methods)}
    tried: dict[str, list[list[Cell]]] = {name: [] for name in methods}
    given = bench.Given(
        context.workdir,
        context.stop,
        prepared.trust,
        prepared.config.merge,
        prepared.tasks,
        paths,
        models.Learning(prepared.tasks),
        functools.cache(lambda items: merging.create(**dict(items))),
        prepared.metric,
        prepared.mode,
    )
    for seed in prepared.config.seeds:
        one = bench.Bench(given, seed)
        for name in settings.RESERVED:
            known[name].append(one.reference(name))
        for name, points in methods.items():
            if len(points) > 1:
                context.say(f"seed {seed}: {name}, the best of {len(points)} on validation")
                tried[name].append([one.point(name, n, p) for n, p in enumerate(points)])
    warn_of_equal_seeds(known["individual"], context)
    best = {name: choose(prepared, found) for name, found in tried.items()}
    chosen = {name: points[best[name]] for name, points in methods.items()}
    for seed in prepared.config.seeds:
        one = bench.Bench(given, seed)
        for name in methods:
            context.say(f"seed {seed}: {name}")
            known[name].append(one.chosen(name, chosen[name]))
    for name in methods:
        say_method(prepared, context, name, chosen[name], known[name])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = results.summarise(known, chosen, prepared.metric, prepared.config.seeds)
    result |= {
        "metric": prepared.metric,
        "tasks": list(prepared.tasks),
        "steps": prepared.config.merge.rounds * sum(p.steps for p in prepared.tasks.values()),
        "peak_memory_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "seconds": time.monotonic() - begin,
        "phases": {"train": training, "merge": time.monotonic() - begin - training},
    }
    return Outcome(storage.plain(result))


def train_stages(prepared: Prepared, context: Context) -> dict[int, rounds.Paths]:
    """Runs the training stages that aren't done, one after the other.

    Returns:
        Seed to where its models are.
    """
    base = prepared.config.merge.base
    if prepared.pretraining is not None:
        base = os.path.join(context.workdir, settings.PRETRAINING)
        context.say("stage: the base")
        stage.run(prepared.pretraining, context._replace(workdir=base), prepared.devices)
    found = {}
    for name, given in prepared.finetunings.items():
        if isinstance(given, str):
            found[name] = given
            continue
        found[name] = os.path.join(context.workdir, TASKS, name)
        if not stage.is_done(found[name]):
            context.say(f"stage: the task {name}")
        config = ConfigDict(configs.thaw(given))
        config.init_from = base
        own = FrozenConfigDict(config)
        stage.run(own, context._replace(workdir=found[name]), prepared.devices)
    paths = dict.fromkeys(prepared.config.seeds, rounds.Paths(base, base, found))
    between = merging.create(**configs.thaw(prepared.config.merge.between))
    for number in range(2, prepared.config.merge.rounds + 1):
        for seed, before in paths.items():
            paths[seed] = train_round(prepared, context, before, between, number, seed)
    return paths


def train_round(
    prepared: Prepared,
    context: Context,
    before: rounds.Paths,
    between: Merger,
    number: int,
    seed: int,
) -> rounds.Paths:
    """Fine-tunes all tasks from the merge of the round before, unless that is done.

    Args:
        prepared: the parts.
        context: the run folder and what else a program is given.
        before: where the seed's models of the round before are.
        between: merges them.
        number: of the round, from 2.
        seed: whose models.

    Returns:
        Where the models are now.
    """
    root = os.path.join(context.workdir, rounds.FOLDER, str(number))
    runs = {name: os.path.join(root, f"{name}_seed{seed}") for name in prepared.tasks}
    begins = {name: f"{run}.safetensors" for name, run in runs.items()}
    missing = [name for name in runs if not storage.as_path(begins[name]).exists()]
    if missing:
        found = rounds.read(before, prepared.config.merge.own, seed, prepared.trust)
        axes = models.axes_of(next(iter(prepared.tasks.values())), found.base)
        starts = rounds.starts(found, between, axes)
        for name in missing:
            facts = {"task": name, "round": str(number), "seed": str(seed)}
            rounds.write(begins[name], starts[name], facts)
    for name, given in prepared.finetunings.items():
        if not stage.is_done(runs[name]):
            context.say(f"stage: round {number}, the task {name}, seed {seed}")
        config = rounds.fine_tuning(given, begins[name], number, seed)
        stage.run(config, context._replace(workdir=runs[name]), prepared.devices)
    return rounds.Paths(before.pretrained, next(iter(begins.values())), runs)


def choose(prepared: Prepared, tried: Sequence[Sequence[Cell]]) -> int:
    """Returns the number of the point that is best on validation, over tasks and seeds.

    Args:
        prepared: the parts.
        tried: for each seed the cells of all points; empty where there is one.
    """
    if not tried:
        return 0
    score = lambda cell: cells.mean(cell.scores["validation"], prepared.metric)
    means = np.mean([[score(cell) for cell in found] for found in tried], axis=0)
    return int(np.nanargmax(means if prepared.mode == "max" else -means))


def warn_of_equal_seeds(individual: Sequence[Cell], context: Context) -> None:
    """Tells the user of seeds whose models are the same."""
    if len(individual) > 1 and all(c.scores == individual[0].scores for c in individual[1:]):
        context.say(
            "the models of all seeds score the same: give them something to differ in, such as "
            "data.order = 'per_seed' in every task"
        )


def say_method(
    prepared: Prepared, context: Context, name: str, point: Mapping, found: Sequence[Cell]
) -> None:
    """Tells what a method came to."""
    score = np.mean([cells.mean(cell.scores["test"], prepared.metric) for cell in found])
    keys = ", ".join(f"{k}={v}" for k, v in point.items() if k != "name")
    context.say(f"{name}{f' ({keys})' if keys else ''}: test {prepared.metric} {score:.4f}")
