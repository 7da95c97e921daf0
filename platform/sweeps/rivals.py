"""The vocabulary of the `shootout` block: workloads, optimizers, and how they are tuned."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.errors import UserError
from lamina.platform.sweeps import settings
from lamina.platform.training import experiment

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
    yield from settings.not_for_trials(c, "a shoot-out")
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
