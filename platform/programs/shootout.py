"""The program `shootout`: optimizers against each other, tuned equally, by the time to a target.

Every optimizer is tuned on every workload: `trials` points of one search space, `studies` times.
The best point is trained again with fresh seeds. Each cell (workload x optimizer x study) is stored
when it is done: a shoot-out that was killed goes on in the cell that it was in, with the same
numbers. Targets are of the validation split; the test split is not read. A workload is a training
experiment, or a stream (program `incremental`).

References:
    Dahl et al., Benchmarking Neural Network Training Algorithms, https://arxiv.org/abs/2306.07179
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import FrozenConfigDict

from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import UserError
from lamina.platform.programs import streamed_cells, trained_cells
from lamina.platform.programs.context import Context, Outcome
from lamina.platform.reporting import folder, formats, storage
from lamina.platform.reporting.clock import Clock
from lamina.platform.sweeps import cells, planning, standings
from lamina.platform.sweeps import pairs as planned
from lamina.platform.sweeps.engines import Engine, Runs
from lamina.platform.sweeps.pairs import Pair
from lamina.platform.sweeps.planning import Trial
from lamina.platform.training import compiled
from lamina.platform.training.experiment import Experiment

ENGINES: Mapping[str, Engine] = {
    "incremental": streamed_cells.ENGINE,
    "train": trained_cells.ENGINE,
}
"""The programs that a workload can be of."""


class Prepared(NamedTuple):
    """A shoot-out before its folder exists.

    Attributes:
        parts: of the first optimizer on the first workload.
        pairs: every optimizer on every workload.
        config: resolved.
        trust: packages whose factories the config may name.
        devices: the devices to use.
    """

    parts: Experiment
    pairs: Sequence[Pair]
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
    """Plans the trials of all cells.

    Raises:
        UserError: a workload or an optimizer is wrong, or the tuning is unequal.
    """
    del fresh
    if jax.process_count() > 1:
        raise UserError("a shoot-out runs in one process")
    found = planned.plan(config, ENGINES, trust, devices, dataset)
    return Prepared(found[0].parts, found, config, trust, devices)


def describe(config: FrozenConfigDict, trust: Sequence[str], dataset: Dataset) -> list[str]:
    """Returns what `lamina check` says of a shoot-out: workloads, optimizers, cost."""
    prepared = prepare(config, trust, None, True, dataset)
    pairs, s = prepared.pairs, config.shootout
    first = pairs[0].studies
    optimizers = list(dict.fromkeys(p.optimizer for p in pairs))
    lines = [
        f"{len(optimizers)} optimizers ({', '.join(optimizers)})",
        f"{len(first)} studies of {len(first[0])} points of {', '.join(first[0][0].values)} "
        f"({s.method}), then the best point with the seeds {tuple(config.seeds)}",
    ]
    total = 0
    for pair in pairs:
        trials = sum(map(len, pair.studies)) + len(config.seeds)
        total += trials * pair.parts.steps
        if pair.optimizer == optimizers[0]:
            sign = ">=" if pair.mode == "max" else "<="
            lines.append(
                f"  {pair.workload}: {pair.metric} {sign} {formats.number(pair.target)} "
                f"within {pair.parts.steps} steps{_stream(pair)}"
            )
    lines.append(f"{len(pairs)} pairs, {total:,} steps in all")
    return lines


def _stream(pair: Pair) -> str:
    """Returns what `describe` says of a workload that is a stream, and nothing of others."""
    if pair.config.program != "incremental":
        return ""
    stream, space = pair.config.stream, pair.parts.recipe.space
    assert space is not None
    return f" of {stream.name} ({space.experiences} experiences), {pair.config.learner.name}"


def is_whole(prepared: Prepared, workdir: str) -> bool:
    """Tells whether all cells are stored."""
    return all(
        cells.read(workdir, pair, study) is not None
        for pair in prepared.pairs
        for study in (*range(len(pair.studies)), None)
    )


def shootout(prepared: Prepared, context: Context) -> Outcome:
    """Runs all cells that the folder doesn't have.

    Args:
        prepared: the plan.
        context: the run folder and what else a program is given.

    Raises:
        InterruptedRun: a signal asked to stop.
    """
    clock, compiling = Clock(), 0.0
    folder.write_parameters(context.workdir, compiled.parameter_rows(prepared.parts))
    studies, fresh = {}, {}
    for number, pair in enumerate(prepared.pairs, start=1):
        found, again, seconds = run_pair(prepared, pair, context)
        studies[pair.workload, pair.optimizer] = found
        fresh[pair.workload, pair.optimizer] = again
        compiling += seconds
        if seconds:
            say(number, len(prepared.pairs), pair, again, context)
    s = prepared.config.shootout
    numbers = standings.build(prepared.pairs, studies, fresh, s.clock, s.ranking)
    if s.ranking:
        context.say(f"score: {scores(numbers)}")
    return Outcome(
        storage.plain(
            {
                "final": standings.final(prepared.pairs, fresh),
                "seconds": clock.elapsed() - compiling,
                "compile_seconds": compiling,
                "shootout": numbers,
            }
        )
    )


def scores(numbers: Mapping[str, Any]) -> str:
    """Returns the optimizers in their order, with their scores."""
    own = numbers["score"][numbers["clock"]]
    return ", ".join(f"{name} {own[name]:.3f}" for name in numbers["ranked"])


def say(number: int, of: int, pair: Pair, again: cells.Cell, context: Context) -> None:
    """Tells how a pair has ended."""
    trial = again["trials"][0]
    middle = standings.median(cells.times(trial, "steps"))
    reached = sum(step is not None for step in trial["steps"])
    point = ", ".join(f"{key.rpartition('.')[2]} {v:g}" for key, v in trial["values"].items())
    text = f"{number}/{of} {pair.workload}, {pair.optimizer}: {point}: target "
    text += f"after {middle:g} steps" if middle < float("inf") else "missed"
    context.say(f"{text} ({reached} of {len(trial['steps'])} seeds)")


def run_pair(
    prepared: Prepared, pair: Pair, context: Context
) -> tuple[list[cells.Cell], cells.Cell, float]:
    """Returns the cells of a pair: its studies', that of fresh seeds, and seconds of compiling.

    Raises:
        InterruptedRun: a signal asked to stop.
    """
    read = lambda study: cells.read(context.workdir, pair, study)
    known = [read(study) for study in range(len(pair.studies))]
    again = read(None)
    if again is not None and all(cell is not None for cell in known):
        return [cell for cell in known if cell is not None], again, 0.0
    open_runs, at_once = ENGINES[pair.config.program].open, prepared.config.shootout.at_once
    with open_runs(pair, prepared.trust, prepared.devices, at_once, context) as runs:
        for study, own in enumerate(pair.studies):
            if known[study] is None:
                known[study] = run_cell(runs, own, pair, study, context)
        done = [cell for cell in known if cell is not None]
        point = cells.best_trial(done, pair.mode)
        trials = (trial for study in pair.studies for trial in study)
        best = next(trial for trial in trials if trial.number == point["trial"])
        best = best._replace(config=planning.with_seeds(best.config, tuple(pair.config.seeds)))
        if again is None:
            again = run_cell(runs, [best], pair, None, context)
        return done, again, runs.seconds()


def run_cell(
    runs: Runs, trials: Sequence[Trial], pair: Pair, study: int | None, context: Context
) -> cells.Cell:
    """Runs and stores a cell.

    Args:
        runs: of the pair.
        trials: of the cell.
        pair: whose cell.
        study: its number; None: fresh seeds.
        context: the run folder and what else a program is given.
    """
    cell = cells.make(pair, runs.measure(trials, study))
    cells.write(context.workdir, pair, study, cell)
    return cell
