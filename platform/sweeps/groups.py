"""What programs of many trials share: which of them share a program, and running them by units."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lamina.platform import config as configs
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import UserError
from lamina.platform.reporting import storage
from lamina.platform.sweeps import lanes, members, planning
from lamina.platform.sweeps.planning import Group, Shape, Trial
from lamina.platform.training import evaluation, experiment, loading, seeds
from lamina.platform.training import settings as training_settings
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.signals import StopRequest

FREE = (
    "checkpoint.every",
    "checkpoint.keep",
    "data.placement",
    "data.workers",
    "trackers",
    "tracker_options",
)
"""Keys that may change between two sessions: they don't change what is computed."""

UNITS = "units"
SHAPES = "shapes.json"


class Base(NamedTuple):
    """What all trials have in common.

    Attributes:
        parts: of the experiment that the trials vary.
        loaded: what isn't drawn.
        trust: packages whose factories the config may name.
        devices: the devices to use.
        at_once: most (trial, seed) pairs trained at once; 0: all that fit in memory.
    """

    parts: Experiment
    loaded: loading.Loaded
    trust: Sequence[str]
    devices: Any
    at_once: int


def selection(parts: Experiment, key: str) -> Callable[[str, str], tuple[str, str]]:
    """Returns `(metric, mode) -> (metric, mode)`, with defaults filled in.

    Args:
        parts: of the experiment.
        key: where the config names the metric, for messages.

    Raises:
        UserError: (by the function) the metric isn't measured.
    """
    chosen = [entry for entry in evaluation.choose(parts) if entry.name != "test"]
    measured = evaluation.metric_names(parts, chosen)

    def choose(metric: str, mode: str) -> tuple[str, str]:
        own, own_mode = parts.recipe.task.select
        if not metric:
            metric, mode = f"validation/{own}", own_mode if mode == "auto" else mode
        if metric not in measured:
            raise UserError(f"{key} = {metric!r} isn't measured: one of {', '.join(measured)}")
        return metric, training_settings.better(metric, mode)

    return choose


def check(trials: Sequence[Trial], trust: Sequence[str], parts: Experiment) -> None:
    """Makes every trial's schedule, optimizer and task, so that they refuse their keys.

    Args:
        trials: all of them.
        trust: packages whose factories the config may name.
        parts: of the experiment that they vary.

    Raises:
        UserError: a trial's config is wrong.
    """
    for trial in trials:
        try:
            experiment.check_factories(trial.config, trust, parts)
        except UserError as error:
            raise UserError(f"{planning.describe(trial.number, trial.values)}: {error}") from error


def find(base: Base, trials: Sequence[Trial]) -> list[Group]:
    """Returns the trials by what has to be compiled.

    Raises:
        UserError: a trial's config is wrong.
    """
    check(trials, base.trust, base.parts)

    def traceable(trial: Trial, keys: tuple[str, ...]) -> tuple[str, ...]:
        alone, data = seeds.Seeds(1, "single"), dataset_of(base, trial)
        return planning.traceable(
            keys,
            lambda some: planning.assemble(
                trial.config, some, alone, (0,), base.trust, base.devices, data
            ),
        )

    found = planning.group(trials, traceable)
    for group in found:
        if not group.hyper:  # nothing was tried: what is wrong shall show now
            first = group.trials[0]
            experiment.assemble(first.config, base.trust, base.devices, dataset_of(base, first))
    return found


def dataset_of(base: Base, trial: Trial) -> Dataset:
    """Returns the data set of a trial: that of the experiment, unless it varies the data."""
    if trial.config.data == base.parts.config.data:
        return base.parts.dataset
    different = configs.difference(
        configs.thaw(base.parts.config.data), configs.thaw(trial.config.data)
    )
    if set(different) <= set(training_settings.Data._fields):
        return base.parts.dataset  # another batch size or order of the same data
    return experiment.open_dataset(trial.config.data, base.trust)


def forbidden_changes(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """Returns the differences between two configs that forbid the new one to go on."""
    return configs.difference(old, new, FREE)


def shape_of(base: Base, group: Group, folder: str) -> Shape:
    """Returns how a group is run, noted in `folder`: who goes on does so in the same way."""
    path = os.path.join(folder, UNITS, SHAPES)
    known = storage.read_object(path)
    name = str(group.trials[0].number)
    if name not in known:
        parts, c = base.parts, group.trials[0].config
        device = parts.mesh.devices.flat[0]
        wanted = len(group.trials) * len(c.seeds)
        fitting = members.at_once(parts, members.memory(device), wanted)
        shape = planning.shape(
            len(group.trials),
            len(c.seeds),
            platform=device.platform,
            devices=parts.mesh.size,
            seed_parallelism=parts.mesh.shape["seed"],
            cores=lanes.cores(),
            steps_per_call=c.steps_per_call,
            at_once=min(fitting, base.at_once) if base.at_once else fitting,
        )
        known[name] = shape._asdict()
        storage.write_json(path, known)
    return Shape(**known[name])


class Programs:
    """The compiled programs of the groups that were asked for last.

    Args:
        base: what all trials have in common.
        keep: how many; an older one is dropped.

    Attributes:
        seen: a key for each program that was asked for.
        seconds: that compiling took.
    """

    def __init__(self, base: Base, keep: int = 1):
        self.base, self.seen, self.seconds = base, set[Any](), 0.0
        self._keep = keep
        self._built: dict[Any, lanes.Compiled] = {}

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *error: object) -> None:
        for built in self._built.values():
            built.close()

    def note(self, group: Group, shape: Shape) -> Any:
        """Returns the key of a group's program."""
        key = (planning.rest_of(group.trials[0], group.hyper), group.hyper, shape[2:])
        self.seen.add(key)
        return key

    def of(self, group: Group, shape: Shape) -> lanes.Compiled:
        """Returns the program of a group, compiled if it isn't yet."""
        key = self.note(group, shape)
        if key not in self._built:
            while len(self._built) >= self._keep:
                self._built.pop(next(iter(self._built))).close()
            data = dataset_of(self.base, group.trials[0])
            built = lanes.compile_group(group, shape, self.base.trust, self.base.devices, data)
            self._built[key] = built
            self.seconds += built.seconds
        return self._built[key]._replace(group=group, shape=shape)


def run_unit(
    programs: Programs,
    group: Group,
    shape: Shape,
    unit: Sequence[Trial],
    folder: str,
    stop: StopRequest,
) -> members.Finished:
    """Runs a unit of a group in its own folder, from its checkpoint if it has one.

    Raises:
        InterruptedRun: a signal asked to stop; the unit is saved.
    """
    path = os.path.join(folder, UNITS, str(unit[0].number))
    return members.run(programs.of(group, shape), unit, path, programs.base.loaded, stop)
