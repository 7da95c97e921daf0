"""The program `benchmark`: learners on streams, each pair a run, and one table of them all.

Every cell is an incremental run in a folder of its own, `cells/STREAM/LEARNER`, with the same
seeds: so the learners of a stream are compared seed by seed. A benchmark that was killed goes on in
the cell that it was in; cells that are done stay as they are.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import UserError
from lamina.platform.incremental import metrics, results
from lamina.platform.incremental.stream import Shared
from lamina.platform.programs import incremental, stage
from lamina.platform.programs.context import Context, Outcome
from lamina.platform.reporting import compare, folder, formats, records, storage
from lamina.platform.training import experiment
from lamina.platform.training.experiment import Experiment

CELLS, COMPARISONS = "cells", "comparisons"
_EMPTY: Mapping[str, Any] = MappingProxyType({})


class Benchmark(NamedTuple):
    """Which learners learn from which streams.

    Attributes:
        learners: their names; the first is the baseline of the paired tests.
        streams: their names.
        learner_options: name to that learner's keys.
        stream_options: name to that stream's keys.
        metric: what the table shows; the cells have all of them.
    """

    learners: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    learner_options: Mapping[str, Any] = _EMPTY
    stream_options: Mapping[str, Any] = _EMPTY
    metric: str = "final_average_accuracy"


def _contradictions(c: FrozenConfigDict) -> Iterable[str]:
    yield from incremental.SCHEMA.contradictions(c)
    b = c.benchmark
    for key, options in (("learners", "learner_options"), ("streams", "stream_options")):
        names = b[key]
        if not names or len(set(names)) != len(names):
            yield f"benchmark.{key} = {names} should be different names, at least one"
        for name in b[options]:
            if name not in names:
                yield f"benchmark.{options}.{name}: {name!r} is none of benchmark.{key}"
    if b.metric not in metrics.METRICS:
        known = ", ".join(sorted(metrics.METRICS))
        yield f"benchmark.metric = {b.metric!r} should be one of {known}"


SCHEMA = incremental.SCHEMA._replace(
    blocks={**incremental.SCHEMA.blocks, "benchmark": Benchmark}, contradictions=_contradictions
)
"""The vocabulary: that of an incremental run, and the block `benchmark`."""


class Cell(NamedTuple):
    """One learner on one stream, and the config of its run."""

    stream: str
    learner: str
    config: FrozenConfigDict

    @property
    def place(self) -> str:
        """Its folder in that of the benchmark."""
        return os.path.join(CELLS, self.stream, self.learner)


class Prepared(NamedTuple):
    """A benchmark before its folder exists.

    Attributes:
        parts: of the first cell.
        config: resolved.
        cells: all of them.
        dataset: that all learn from.
        devices: the devices to use.
    """

    parts: Experiment
    config: FrozenConfigDict
    cells: tuple[Cell, ...]
    dataset: Dataset
    devices: Any


def resolve(config: Any, trust: Sequence[str] = configs.EVERYONE) -> FrozenConfigDict:
    """Returns the whole config, checked, also that of every cell.

    Raises:
        UserError: lists all mistakes of the config, or of the first cell that has some.
    """
    resolved = configs.resolve(config, SCHEMA, trust)
    cells(resolved, trust)
    return resolved


def cells(config: FrozenConfigDict, trust: Sequence[str]) -> tuple[Cell, ...]:
    """Returns the cells, stream by stream.

    Raises:
        UserError: a learner or a stream doesn't know one of its keys.
    """
    plain = configs.thaw(config)
    b = plain.pop("benchmark")
    shared = {key: plain["stream"][key] for key in Shared._fields}
    found = []
    for stream in b["streams"]:
        for learner in b["learners"]:
            own = {
                "program": "incremental",
                "stream": {**shared, **b["stream_options"].get(stream, {}), "name": stream},
                "learner": {**b["learner_options"].get(learner, {}), "name": learner},
            }
            with _naming(stream, learner):
                resolved = incremental.resolve({**plain, **own}, trust)
            found.append(Cell(stream, learner, resolved))
    return tuple(found)


@contextlib.contextmanager
def _naming(stream: str, learner: str) -> Iterator[None]:
    """Says in a `UserError` which cell it comes from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{learner} on {stream}: {error}") from error


def prepare(
    config: FrozenConfigDict,
    trust: Sequence[str],
    devices: Sequence[jax.Device] | None,
    fresh: bool,
    dataset: Dataset | None = None,
) -> Prepared:
    """Builds every cell once, so that what doesn't fit shows before there is a folder.

    Raises:
        UserError: a learner, a stream, the data and the devices don't fit each other.
    """
    del fresh
    dataset = dataset or experiment.open_dataset(config.data, trust)
    all_cells, parts = cells(config, trust), None
    for cell in all_cells:
        with _naming(cell.stream, cell.learner):
            built = incremental.prepare(cell.config, trust, devices, True, dataset)
        parts = parts or built.parts
    assert parts is not None
    return Prepared(parts, config, all_cells, dataset, devices)


def describe(config: FrozenConfigDict, trust: Sequence[str], dataset: Dataset) -> list[str]:
    """Returns what `lamina check` says: the cells."""
    del dataset
    names = [f"{cell.learner} on {cell.stream}" for cell in cells(config, trust)]
    return [f"{len(names)} runs of {len(config.seeds)} seeds: {', '.join(names)}"]


def is_whole(prepared: Prepared, workdir: str) -> bool:
    """Tells whether all cells are done."""
    return all(stage.is_done(os.path.join(workdir, cell.place)) for cell in prepared.cells)


def run(prepared: Prepared, context: Context) -> Outcome:
    """Runs the cells that aren't done, and compares the learners of each stream.

    Raises:
        InterruptedRun: a signal asked to stop.
        DivergedError: a cell diverged.
    """
    begin = time.monotonic()
    for number, cell in enumerate(prepared.cells):
        root = os.path.join(context.workdir, cell.place)
        if not stage.is_done(root):
            context.stop.before(cell.place, number)
            context.say(f"{cell.place} ({number + 1} of {len(prepared.cells)})")
            build = lambda config, trust, devices, fresh: incremental.prepare(
                config, trust, devices, fresh, prepared.dataset
            )
            inner = context._replace(workdir=root)
            stage.run(cell.config, inner, prepared.devices, build, incremental.run)
    result = summarise(prepared, context.workdir)
    for row in result["table"]:
        context.say(line(row))
    for stream in dict.fromkeys(cell.stream for cell in prepared.cells):
        places = [
            os.path.join(context.workdir, cell.place)
            for cell in prepared.cells
            if cell.stream == stream
        ]
        if len(places) > 1 and jax.process_index() == 0:
            page = storage.as_path(context.workdir) / COMPARISONS / f"{stream}.html"
            page.parent.mkdir(parents=True, exist_ok=True)
            compare.compare(places, page)
    result["seconds"] = time.monotonic() - begin
    return Outcome(storage.plain(result))


def summarise(prepared: Prepared, workdir: str) -> dict[str, Any]:
    """Returns what `result.json` holds: the metric of each cell, and the table of comparisons.

    A row of the table has the mean over seeds, its standard error, and (but for the first learner
    of a stream) the mean difference to that learner on the same seeds, its standard error, and the
    p value of the paired t-test; and where `cumulative` is among the learners, the intransigence
    against it.
    """
    metric, seeds = prepared.config.benchmark.metric, prepared.config.seeds
    final, table = {}, []
    baselines: dict[str, dict[int, float | None]] = {}
    for cell in prepared.cells:
        found = scores(prepared, cell, workdir)
        entry = found[metric]
        final[f"{cell.stream}/{cell.learner}"] = entry
        values = dict(zip(seeds, entry["values"], strict=True))
        mean, std, known = records.summary(entry["values"])
        row = {
            "stream": cell.stream,
            "learner": cell.learner,
            "mean": mean,
            "error": std / math.sqrt(len(known)) if std is not None and len(known) > 1 else None,
        }
        if "cumulative" in prepared.config.benchmark.learners:
            row["intransigence"] = found["intransigence"]["mean"]
        if cell.stream in baselines:
            test = compare.paired(values, baselines[cell.stream])
            row |= {"difference": test.difference, "difference_error": test.error, "p": test.p}
        baselines.setdefault(cell.stream, values)
        table.append(row)
    return {"final": final, "metric": metric, "table": table}


def scores(prepared: Prepared, cell: Cell, workdir: str) -> Mapping[str, Any]:
    """Returns the final scores of a cell that is done.

    Where the benchmark has the learner `cumulative`, intransigence is against that model, which was
    trained on all data so far, seed by seed.
    """
    found = _result(os.path.join(workdir, cell.place))
    if "cumulative" not in prepared.config.benchmark.learners:
        return found["final"]
    own, upper = (
        _accuracies(os.path.join(workdir, each.place))
        for each in (cell, cell._replace(learner="cumulative"))
    )
    reference = upper.diagonal(axis1=-2, axis2=-1)
    values = metrics.intransigence(own, reference=reference).tolist()
    return {**found["final"], "intransigence": records.summary(values)._asdict()}


def _result(workdir: str) -> Mapping[str, Any]:
    found = folder.read_result(workdir)
    assert found is not None
    return found


def _accuracies(workdir: str) -> metrics.Array:
    """Returns the accuracies of a finished cell, [seed, experience, task]."""
    with (storage.as_path(workdir) / results.ACCURACY).open("rb") as file:
        return metrics.after_experiences(np.load(file), _result(workdir)["accuracy"]["ends"])


def line(row: Mapping[str, Any]) -> str:
    """Returns a row of the table as text."""
    number = lambda value: formats.with_decimals(value, 0.0001)
    said = f"{row['stream']:20} {row['learner']:16} {number(row['mean'])} ± {number(row['error'])}"
    if row.get("difference") is None:
        return said
    p = f", p = {row['p']:.2g}" if row["p"] is not None else ""
    return f"{said}   {formats.signed(row['difference'])} ± {number(row['difference_error'])}{p}"
