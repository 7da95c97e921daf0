"""What a shoot-out compares: its vocabulary, and the trials of every workload and optimizer."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import UserError
from lamina.platform.sweeps import planning, scoring, space
from lamina.platform.sweeps.engines import Engine
from lamina.platform.sweeps.planning import Trial
from lamina.platform.training import experiment
from lamina.platform.training.experiment import Experiment

_EMPTY: Mapping[str, Any] = MappingProxyType({})


class Shootout(NamedTuple):
    """The comparison: workloads, optimizers, and how each optimizer is tuned.

    `seeds` of the config are the fresh seeds with which the best point of every workload and
    optimizer is trained again.

    Attributes:
        workloads: name to a block: `target` to reach, `metric` of the validation split ("" takes
            the task's), `mode` ("auto", "max", "min"), and `config`, which changes keys of this
            config; a block in it with a `name` starts from that name's defaults. With
            `program="incremental"` in it the workload is a stream.
        optimizers: name to a block: `config` (as above, after the workload's), and where they
            differ from those below `space`, `trials` and `studies`.
        space: of every optimizer, as `sweep.space`.
        trials: points of a study.
        studies: independent searches; their points are disjoint.
        method: "halton" draws the points evenly, "random" independently.
        seed: of the draw, which is the same for all optimizers with the same space.
        tuning_seed: seed of the first study's trials; the next study has the next one.
        clock: what optimizers are ranked by: "steps" or "seconds" to the target.
        ranking: whether to rank; only optimizers that were tuned equally can be.
        at_once: most (trial, seed) pairs trained at once; 0: all that fit in memory.
    """

    workloads: Mapping[str, Any] = _EMPTY
    optimizers: Mapping[str, Any] = _EMPTY
    space: Mapping[str, Any] = _EMPTY
    trials: int = 5
    studies: int = 1
    method: Literal["halton", "random"] = "halton"
    seed: int = 0
    tuning_seed: int = 1000
    clock: Literal["steps", "seconds"] = "steps"
    ranking: bool = True
    at_once: int = 0


class Workload(NamedTuple):
    """A block of `shootout.workloads`; see there."""

    target: float
    metric: str = ""
    mode: Literal["auto", "max", "min"] = "auto"
    config: Mapping[str, Any] = _EMPTY


class Rival(NamedTuple):
    """A block of `shootout.optimizers`; see there. 0 and an empty space take the shoot-out's."""

    config: Mapping[str, Any] = _EMPTY
    space: Mapping[str, Any] = _EMPTY
    trials: int = 0
    studies: int = 0


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
    """

    workload: str
    optimizer: str
    config: FrozenConfigDict
    parts: Experiment
    target: float
    metric: str
    mode: str
    studies: tuple[tuple[Trial, ...], ...]


def _block(kind: type, key: str, block: Any) -> Any:
    """Returns a resolved block of `shootout.workloads` or `shootout.optimizers`."""
    if not isinstance(block, Mapping | FrozenConfigDict):
        raise UserError(f"{key} = {block!r} should be a block of keys")
    try:
        resolved = configs.resolve(configs.thaw(block), configs.Schema(kind, {}, {}))
    except UserError as error:
        raise UserError(f"{key}: {str(error).removeprefix('config: ')}") from error
    return kind(**configs.thaw(resolved))


def workloads(config: FrozenConfigDict) -> dict[str, Workload]:
    """Returns the workloads of a config by name."""
    blocks = config.shootout.workloads
    return {n: _block(Workload, f"shootout.workloads.{n}", blocks[n]) for n in blocks}


def optimizers(config: FrozenConfigDict) -> dict[str, Rival]:
    """Returns the optimizers of a config by name, each with its own search."""
    s = config.shootout
    found = {}
    for name in s.optimizers:
        own = _block(Rival, f"shootout.optimizers.{name}", s.optimizers[name])
        found[name] = own._replace(
            space=own.space or configs.thaw(s.space),
            trials=own.trials or s.trials,
            studies=own.studies or s.studies,
        )
    return found


def _contradictions(c: FrozenConfigDict) -> Iterable[str]:
    yield from experiment.SCHEMA.contradictions(c)
    s = c.shootout
    for kind, block in (("workloads", s.workloads), ("optimizers", s.optimizers)):
        if not block:
            yield f"shootout.{kind} is empty: name at least one"
        for name in block:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                yield f"shootout.{kind}: {name!r} should be made of letters, digits, _ and -"
    rivals: dict[str, Rival] = {}
    try:
        workloads(c)
        rivals = optimizers(c)
    except UserError as error:
        yield str(error)
    for name, own in rivals.items():
        if "program" in own.config:
            yield f"shootout.optimizers.{name}.config.program: the program is the workload's"
        if own.trials < 1 or own.studies < 1:
            yield f"{name}: trials = {own.trials} and studies = {own.studies} should be 1 or more"
    studies = max((own.studies for own in rivals.values()), default=1)
    used = set(range(s.tuning_seed, s.tuning_seed + studies)) & set(c.seeds)
    if used:
        yield (
            f"seeds = {tuple(c.seeds)} should be fresh, but the trials of a study are trained with "
            f"{sorted(used)}: change shootout.tuning_seed"
        )
    if not 0 <= s.seed < 2**32 or not 0 <= s.tuning_seed < 2**31:
        yield f"shootout.seed = {s.seed} and tuning_seed = {s.tuning_seed} are out of range"
    if s.at_once < 0:
        yield f"shootout.at_once = {s.at_once} should be 0 or more"


SCHEMA = experiment.SCHEMA._replace(
    blocks={**experiment.SCHEMA.blocks, "shootout": Shootout}, contradictions=_contradictions
)
"""The vocabulary of a shoot-out: that of a training experiment, and the block `shootout`."""


def resolve(config: Any, trust: Any = configs.EVERYONE) -> FrozenConfigDict:
    """Returns the whole config of a shoot-out, checked.

    Raises:
        UserError: lists all mistakes.
    """
    return configs.resolve(config, SCHEMA, trust)


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


def pairs(
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
    rivals, s = optimizers(config), config.shootout
    opened = {repr(configs.thaw(config.data)): dataset} if dataset is not None else {}
    found = []
    for workload, block in workloads(config).items():
        program = str(block.config.get("program", "train"))
        if program not in engines:
            raise UserError(
                f"shootout.workloads.{workload}.config.program = {program!r} can't be a workload: "
                f"one of {', '.join(sorted(engines))}"
            )
        engine = engines[program]
        for optimizer, own in rivals.items():
            where = (f"shootout.workloads.{workload}", f"shootout.optimizers.{optimizer}")
            changes = [(where[0], block.config), (where[1], own.config)]
            c = own_config(config, changes, trust, program, engine)
            data = repr(configs.thaw(c.data))
            if data not in opened:
                opened[data] = experiment.open_dataset(c.data, trust)
            try:
                parts = engine.assemble(c, trust, devices, opened[data])
                choose = engine.select(parts, f"{where[0]}.metric")
                metric, mode = choose(block.metric, block.mode)
            except UserError as error:
                raise UserError(f"{workload}, {optimizer}: {error}") from error
            domains, problems = space.read(own.space, c, "shootout.space")
            if problems:
                raise UserError(f"{workload}, {optimizer}: {'; '.join(problems)}")
            points = space.draw(domains, own.trials * own.studies, s.seed, s.method)
            studies = []
            for study in range(own.studies):
                seeded = planning.with_seeds(c, (s.tuning_seed + study,))
                numbers = range(study * own.trials, (study + 1) * own.trials)
                make = partial(
                    planning.make_trial,
                    config=seeded,
                    trust=trust,
                    schema=engine.schema,
                    program=program,
                )
                studies.append(tuple(make(i, points[i]) for i in numbers))
            found.append(
                Pair(workload, optimizer, c, parts, block.target, metric, mode, tuple(studies))
            )
    if s.ranking:
        keys = {p.optimizer: len(p.studies[0][0].values) for p in found}
        scoring.check_equal_tuning(
            {name: (keys[name], own.trials, own.studies) for name, own in rivals.items()}
        )
    return found
