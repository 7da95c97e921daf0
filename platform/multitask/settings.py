"""The vocabulary of the program `merge`: several tasks, and the methods to merge their models."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.errors import UserError
from lamina.platform.merging import table
from lamina.platform.merging.method import Method
from lamina.platform.training import experiment, trained

_EMPTY: Mapping[str, Any] = MappingProxyType({})

PRETRAINING = "pretrain"
"""The folder of the base's training."""

_TRAINED = ("data", "model", "task", "optimizer", "schedule")
"""The blocks that a training can't do without."""

RESERVED = ("individual", "pretrained")
"""Rows of the result that are no methods."""


class Merge(NamedTuple):
    """The models to merge, and how.

    Attributes:
        tasks: name to what its fine-tuning changes in this config (a block with a `name` replaces
            the whole block), or to `dict(run="runs/x")`, a run that is there.
        finetune: what all fine-tunings change in this config.
        base: a run or safetensors file that they start from; "" trains it with this config's own
            data, model, task and optimizer, on the first seed.
        own: regular expressions; a parameter whose path one of them finds is not merged: each task
            keeps its own.
        methods: name to a block with the merger's `name` and keys; a tuple in the place of a
            number is a grid, of which the point that is best on validation is taken.
        rounds: of fine-tuning, each as long as `finetune` says, and each but the first from the
            merge of the one before (ATM); the methods merge the models of the last.
        between: the merger between two rounds, a block with `name` and keys; one without data.
        metric: by which points are chosen and models compared; "" takes the first task's.
        examples: training examples of each task for Fishers and Gram matrices.
        fisher: where the labels of the Fisher information come from.
        unlabeled: the split that learned merges see; its labels only with `objective="labels"`.
        steps: of learned merges.
        batch_size: examples of each task in a step of a learned merge.
    """

    tasks: Mapping[str, Any]
    methods: Mapping[str, Any]
    finetune: Mapping[str, Any] = _EMPTY
    base: str = ""
    own: tuple[str, ...] = ("^head/",)
    rounds: int = 1
    between: Mapping[str, Any] = MappingProxyType({"name": "linear"})
    metric: str = ""
    examples: int = 256
    fisher: Literal["sampled", "empirical", "exact"] = "sampled"
    unlabeled: Literal["train", "validation"] = "validation"
    steps: int = 500
    batch_size: int = 16


def _contradictions(c: FrozenConfigDict) -> Iterable[str]:
    if c.merge.base == "":
        yield from experiment.SCHEMA.contradictions(c)
    m = c.merge
    if len(m.tasks) < 2:
        yield "merge.tasks should have two tasks or more"
    if not m.methods:
        yield "merge.methods is empty: give a merger, such as average=dict(name='linear')"
    for key in ("tasks", "methods"):
        for name, block in m[key].items():
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in RESERVED:
                yield f"merge.{key} has {name!r}: names are of letters, digits, _ . - and no row's"
            if not isinstance(block, Mapping | FrozenConfigDict):
                yield f"merge.{key}.{name} = {block!r} should be a block"
                return
    for pattern in m.own:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"merge.own: {pattern!r} is no regular expression: {error}"
    for key in ("rounds", "examples", "steps", "batch_size"):
        if m[key] < 1:
            yield f"merge.{key} = {m[key]} should be at least 1"
    if c.early_stopping.metric:
        yield "early_stopping isn't for merged models: their runs have one length"
    given = [name for name, block in m.tasks.items() if "run" in block]
    if m.rounds > 1 and given:
        yield (
            f"merge.rounds = {m.rounds} fine-tunes every task again, but merge.tasks.{given[0]} is "
            "a run that is there: give what the task changes in this config"
        )
    for name, block in m.methods.items():
        try:
            _bind_all(block, len(m.tasks))
        except (UserError, ValueError) as error:
            yield f"merge.methods.{name}: {error}"
    try:
        found = _bind_all(m.between, len(m.tasks))
        if len(found) > 1:
            raise UserError("a grid has no place between two rounds: give each key one value")
        if found[0].needs:
            raise UserError(
                f"{m.between['name']} needs data, or trains: between two rounds give a merger that "
                "does without, such as linear, task_arithmetic or ties"
            )
    except (UserError, ValueError) as error:
        yield f"merge.between: {error}"


def _bind_all(block: Mapping[str, Any], count: int) -> list[Any]:
    """Returns what `bind` makes of all points of a block, having checked them for `count` models.

    Raises:
        UserError: there is no such method, or it isn't for fine-tuned models.
        ValueError: it doesn't take so many models.
    """
    found = [bind(point) for point in points(block)]
    if not found:
        raise UserError("a grid without a point: give every key a value or more")
    for made in found:
        if isinstance(made, Method):
            made.weights(count, None)
        elif made.needs == "spec":
            raise UserError(
                f"{block['name']} is for models that were trained apart (program rebasin, lamina "
                "merge --align): these have a common base"
            )
    return found


SCHEMA = experiment.SCHEMA._replace(
    blocks={**experiment.SCHEMA.blocks, "merge": Merge}, contradictions=_contradictions
)
"""The vocabulary of a merge of tasks: that of a training experiment, and the block `merge`."""


def resolve(config: Any, trust: Sequence[str] = configs.EVERYONE) -> FrozenConfigDict:
    """Returns the whole config, checked, with its fine-tunings.

    Where all models are runs that are there, what the config doesn't say of the data, the model and
    the training is that of the first run.

    Raises:
        UserError: lists all mistakes.
    """
    plain = configs.thaw(config)
    resolved = configs.resolve({**_of_first_run(plain, trust), **plain}, SCHEMA, trust)
    for _ in finetunings(resolved, trust):
        pass
    return resolved


def _of_first_run(plain: Mapping[str, Any], trust: Sequence[str]) -> dict[str, Any]:
    """Returns the missing blocks of a config whose models are all runs; of others, none."""
    merge = plain.get("merge")
    missing = [key for key in _TRAINED if key not in plain]
    if not missing or not isinstance(merge, Mapping) or not merge.get("base"):
        return {}
    tasks = merge.get("tasks")
    if not isinstance(tasks, Mapping) or not tasks:
        return {}
    given = [task.get("run") for task in tasks.values() if isinstance(task, Mapping)]
    runs = [run for run in given if isinstance(run, str)]
    if len(runs) < len(tasks):
        return {}
    try:
        found = configs.thaw(trained.read_config(runs[0], trust))
    except UserError as error:
        raise UserError(f"merge.tasks.{next(iter(tasks))}: {error}") from error
    return {key: found[key] for key in missing}


def points(block: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the points of a method's grid: blocks in which every key has one value.

    Example:
        >>> points({"name": "ties", "scale": (0.5, 1.0)})
        [{'name': 'ties', 'scale': 0.5}, {'name': 'ties', 'scale': 1.0}]
    """
    plain = configs.thaw(block)
    values = [v if isinstance(v, tuple) else (v,) for v in plain.values()]
    return [dict(zip(plain, point, strict=True)) for point in itertools.product(*values)]


def bind(point: Mapping[str, Any]) -> Any:
    """Returns what the method's factory makes of a point.

    Raises:
        UserError: there is no such method, or a key of it is wrong.
    """
    if not isinstance(point.get("name"), str):
        raise UserError(f"name is missing: one of {', '.join(sorted(table.MERGERS))}")
    return table.bind(point["name"], {k: v for k, v in point.items() if k != "name"})


def pretraining(c: FrozenConfigDict, trust: Sequence[str]) -> FrozenConfigDict | None:
    """Returns the config of the base's training, or None where the base is given."""
    if c.merge.base:
        return None
    plain = _template(c)
    plain["seeds"] = c.seeds[:1]
    return experiment.resolve(plain, trust)


def finetunings(c: FrozenConfigDict, trust: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields each task's name with the config of its fine-tuning, or with the path of its run.

    Its `init_from` is the base, or `PRETRAINING` where that has still to be trained.

    Raises:
        UserError: a task's config is wrong; the message names the task.
    """
    for name, block in c.merge.tasks.items():
        own = configs.thaw(block)
        if "run" in own:
            if set(own) != {"run"} or not isinstance(own["run"], str):
                raise UserError(f"merge.tasks.{name} is a run: give `run` alone, a path")
            yield name, own["run"]
            continue
        plain = {**_template(c), "init_from": c.merge.base or PRETRAINING}
        fixed = {key: plain[key] for key in ("program", "seeds", "init_from")}
        for changes in (configs.thaw(c.merge.finetune), own):
            plain = _changed(plain, changes)
        if fixed != {key: plain[key] for key in fixed}:
            raise UserError(f"merge.tasks.{name}: program, seeds and init_from are given by merge")
        try:
            yield name, experiment.resolve(plain, trust)
        except UserError as error:
            raise UserError(f"merge.tasks.{name}: {error}") from error


def _template(c: FrozenConfigDict) -> dict[str, Any]:
    plain = configs.thaw(c)
    del plain["merge"]
    return {**plain, "program": "train"}


def _changed(plain: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with some keys changed, block by block."""
    result = dict(plain)
    for key, value in changes.items():
        before = plain.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping) and "name" not in value:
            result[key] = _changed(dict(before), value)
        else:
            result[key] = value
    if "steps" in changes or "epochs" in changes:
        result |= {key: changes.get(key, type(plain[key])(0)) for key in ("steps", "epochs")}
    return result
