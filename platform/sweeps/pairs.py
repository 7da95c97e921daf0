"""The pairs of a shoot-out: every optimizer on every workload, with its trials."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import UserError
from lamina.platform.sweeps import planning, scoring, space
from lamina.platform.sweeps.engines import Engine
from lamina.platform.sweeps.planning import Trial
from lamina.platform.sweeps.rivals import Rival, optimizers, workloads
from lamina.platform.training import experiment
from lamina.platform.training.experiment import Experiment

OWN = ("optimizer", "schedule", "clip_norm", "ema", "swa", "lawa", "islands")
"""What rivals may differ in and be ranked: keys and blocks."""


class Pair(NamedTuple):
    """An optimizer on a workload.

    Attributes:
        workload: its name.
        optimizer: its name.
        config: the resolved config of its runs, whose seeds are the fresh ones.
        parts: of it.
        target: to reach.
        metric: that reaches it.
        mode: "max" or "min".
        studies: the trials of each, under the study's seed.
        tuning: how much of which space they try.
    """

    workload: str
    optimizer: str
    config: FrozenConfigDict
    parts: Experiment
    target: float
    metric: str
    mode: str
    studies: tuple[tuple[Trial, ...], ...]
    tuning: scoring.Tuning


def changed(
    config: Mapping[str, Any],
    changes: Mapping[str, Any],
    schema: configs.Schema = experiment.SCHEMA,
) -> dict[str, Any]:
    """Returns a config with changes: nested blocks, of which one with a `name` replaces its kind's.

    Keys that every name of the kind has (such as `learning_rate` and `batch_size`) stay.
    """
    result = dict(config)
    for key, value in changes.items():
        before, kind = result.get(key), schema.kinds.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            if kind is not None and "name" in value:
                shared = configs.options(kind.shared) if kind.shared is not None else {}
                before = {k: v for k, v in before.items() if k in shared}
            inner = changed(before, value, schema) if kind is None else {**before, **value}
            result[key] = inner
        else:
            result[key] = value
    return result


def own_config(
    config: FrozenConfigDict,
    changes: Sequence[tuple[str, Mapping[str, Any]]],
    trust: Sequence[str],
    program: str,
    engine: Engine,
) -> FrozenConfigDict:
    """Returns the config of a pair's runs, which is the shoot-out's with some changes.

    Args:
        config: of the shoot-out.
        changes: where each stands, for messages, and what it changes.
        trust: packages whose factories the config may name.
        program: of the workload.
        engine: that program, as shoot-outs see it.

    Raises:
        UserError: the changed config is wrong.
    """
    plain = {k: v for k, v in configs.thaw(config).items() if k != "shootout"}
    for block in (engine.own, *(block for _, block in changes)):
        plain = changed(plain, configs.thaw(block), engine.schema)
    try:
        return configs.resolve({**plain, "program": program}, engine.schema, trust)
    except UserError as error:
        raise UserError(f"{' and '.join(where for where, _ in changes)}: {error}") from error


def plan(
    config: FrozenConfigDict,
    engines: Mapping[str, Engine],
    trust: Sequence[str],
    devices: Any,
    dataset: Dataset | None = None,
) -> list[Pair]:
    """Returns every optimizer on every workload, with its trials, without computing anything.

    Args:
        config: of the shoot-out.
        engines: by the name of the program that a workload is of.
        trust: packages whose factories the config may name.
        devices: the devices to use.
        dataset: of the config itself.

    Raises:
        UserError: a workload or an optimizer is wrong, or the tuning is unequal.
    """
    opened = {repr(configs.thaw(config.data)): dataset} if dataset is not None else {}

    def dataset_of(own: FrozenConfigDict) -> Dataset:
        key = repr(configs.thaw(own.data))
        if key not in opened:
            opened[key] = experiment.open_dataset(own.data, trust)
        return opened[key]

    rivals, found = optimizers(config), []
    for workload, block in workloads(config).items():
        where = f"shootout.workloads.{workload}"
        program = str(block.config.get("program", "train"))
        if program not in engines:
            raise UserError(
                f"{where}.config.program = {program!r} can't be a workload: "
                f"one of {', '.join(sorted(engines))}"
            )
        engine = engines[program]
        for optimizer, own in rivals.items():
            changes = [(where, block.config), (f"shootout.optimizers.{optimizer}", own.config)]
            c = own_config(config, changes, trust, program, engine)
            try:
                parts = engine.assemble(c, trust, devices, dataset_of(c))
                choose = engine.select(parts, f"{where}.metric")
                metric, mode = choose(block.metric, block.mode)
                domains = _domains(own, c)
                studies = tuple(_studies(config, c, own, domains, engine, trust))
            except UserError as error:
                raise UserError(f"{workload}, {optimizer}: {error}") from error
            widths = {domain.key: domain.width for domain in domains}
            tuning = scoring.Tuning(widths, own.trials, own.studies)
            found.append(
                Pair(workload, optimizer, c, parts, block.target, metric, mode, studies, tuning)
            )
    if config.shootout.ranking:
        check_equal(found)
    return found


def _domains(own: Rival, c: FrozenConfigDict) -> list[space.Domain]:
    domains, problems = space.read(own.space, c, "shootout.space")
    if problems:
        raise UserError("; ".join(problems))
    return domains


def _studies(
    config: FrozenConfigDict,
    c: FrozenConfigDict,
    own: Rival,
    domains: Sequence[space.Domain],
    engine: Engine,
    trust: Sequence[str],
) -> Iterator[tuple[Trial, ...]]:
    """Yields the trials of each study of a pair with the config `c`."""
    s = config.shootout
    points = space.draw(domains, own.trials * own.studies, s.seed, s.method)
    for study in range(own.studies):
        seed = s.tuning_seed + study
        if seed in c.seeds:
            raise UserError(
                f"seeds = {tuple(c.seeds)} should be fresh, but the trials of study {study} are "
                f"trained with {seed}: change shootout.tuning_seed"
            )
        make = partial(
            planning.make_trial,
            config=planning.with_seeds(c, (seed,)),
            trust=trust,
            schema=engine.schema,
            program=c.program,
        )
        numbers = range(study * own.trials, (study + 1) * own.trials)
        yield tuple(make(i, points[i]) for i in numbers)


def check_equal(found: Sequence[Pair]) -> None:
    """Refuses to rank optimizers that were tuned, or are measured, unequally.

    Raises:
        UserError: names what differs.
    """
    firsts: dict[str, Pair] = {}
    for pair in found:
        first = firsts.setdefault(pair.workload, pair)
        different = configs.difference(configs.thaw(first.config), configs.thaw(pair.config), OWN)
        for key, (one, other) in different.items():
            raise UserError(
                f"on {pair.workload}, {key} is {one!r} for {first.optimizer} and {other!r} for "
                f"{pair.optimizer}: who shall be ranked differs in optimizer, schedule, clipping, "
                "averaging and islands alone (or set shootout.ranking = False)"
            )
    scoring.check_equal_tuning({pair.optimizer: pair.tuning for pair in found})
