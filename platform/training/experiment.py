"""From a resolved config to the parts of a training run, built without computing anything."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from lamina.models import placement
from lamina.models.functional import FunctionalModel, functional
from lamina.models.spec import DataSpec
from lamina.models.table import MODELS
from lamina.platform import config as configs
from lamina.platform.data import balancing
from lamina.platform.data import feed as feeds
from lamina.platform.data.augmentations import AUGMENTATIONS
from lamina.platform.data.dataset import Dataset
from lamina.platform.data.table import DATASETS
from lamina.platform.errors import UserError
from lamina.platform.optimizers import table, weights
from lamina.platform.optimizers.islands.table import METHODS
from lamina.platform.training import (
    contradictions,
    islands,
    layout,
    learners,
    optimizing,
    parameters,
    seeds,
    settings,
    splitting,
    step,
)
from lamina.platform.training.state import TrainState
from lamina.platform.training.tasks import TASKS, Task
from lamina.sharding import mesh as meshes
from lamina.sharding import rules as partition_rules

SCHEMA = configs.Schema(
    settings=settings.Settings,
    blocks={
        "adapters": settings.Adapters,
        "checkpoint": settings.Checkpoint,
        "debug": settings.Debug,
        "early_stopping": settings.EarlyStopping,
        "ema": settings.Ema,
        "evaluation": settings.Evaluation,
        "init_from_rules": settings.InitRules,
        "lawa": settings.Lawa,
        "mesh": meshes.create,
        "profile": settings.Profile,
        "sharding": settings.Sharding,
        "swa": settings.Swa,
    },
    kinds={
        "data": configs.Kind(DATASETS, shared=settings.Data, makes=Dataset),
        "islands": configs.Kind(METHODS, default="none"),
        "model": configs.Kind(MODELS, takes="rngs, spec, dtype", makes=nnx.Module),
        "optimizer": configs.Kind(table.OPTIMIZERS, table.options, settings.Optimizer),
        "schedule": optimizing.SCHEDULE,
        "task": configs.Kind(TASKS, takes="spec", makes=Task),
    },
    contradictions=contradictions.find,
)
"""The vocabulary of training configs."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Experiment(NamedTuple):
    """The parts of a training run.

    Attributes:
        config: resolved.
        trust: packages whose factories the config may name.
        mesh: of all devices.
        seeds: how the seeds are run.
        dataset: the opened data set.
        steps: optimizer steps of the whole run.
        recipe: the step's pure functions.
        batch: a batch of one seed, as `jax.ShapeDtypeStruct`s.
        state: of all seeds, as `jax.ShapeDtypeStruct`s with shardings.
    """

    config: FrozenConfigDict
    trust: Sequence[str]
    mesh: Mesh
    seeds: seeds.Seeds
    dataset: Dataset
    steps: int
    recipe: step.Recipe
    batch: Any
    state: TrainState


class Stream(NamedTuple):
    """What an incremental run adds.

    Attributes:
        learner: learns from the stream.
        space: the stream's sizes.
        steps: of the whole stream.
        per_seed: whether each seed has a stream of its own.
        batch: of one seed, as `jax.ShapeDtypeStruct`s.
        ends: steps done at the end of each experience.
    """

    learner: learners.Learner
    space: learners.Space
    steps: int
    per_seed: bool
    batch: Any
    ends: tuple[int, ...]


class Members(NamedTuple):
    """Trials of several seeds that are run like seeds, with hyper-parameters of their own.

    Attributes:
        seeds: how they are run; None: as the seeds of any run.
        hyper: config key to the value's type, as `jax.ShapeDtypeStruct`s of shape [].
    """

    seeds: seeds.Seeds | None
    hyper: Mapping[str, jax.ShapeDtypeStruct]


def resolve(config: Any, trust: Sequence[str] = configs.EVERYONE) -> FrozenConfigDict:
    """Returns the whole training config, checked key by key and for contradictions.

    Raises:
        UserError: lists all mistakes.
    """
    return configs.resolve(config, SCHEMA, trust)


def open_dataset(block: Mapping, trust: Sequence[str]) -> Dataset:
    """Opens the data set of a `data` block.

    Raises:
        UserError: it is missing, corrupt or misnamed, or a batch would hold it many times.
    """
    dataset = configs.build(block, SCHEMA.kinds["data"], "data", trust)
    splitting.check_size(block, len(dataset.splits.get("train", ())))
    return dataset


def open_stand_in(block: Mapping, trust: Sequence[str]) -> tuple[Dataset, str]:
    """Opens the data set, or the stand-in of one that isn't on this machine.

    Returns:
        The data set, and why it is the stand-in ("" if it isn't).

    Raises:
        UserError: neither can be opened.
    """
    try:
        return open_dataset(block, trust), ""
    except UserError as error:
        if not block["stand_in"]:
            raise
        schema = configs.Schema(
            configs.NoSettings, {}, {"data": SCHEMA.kinds["data"]._replace(shared=None)}
        )
        resolved = configs.resolve({"data": block["stand_in"]}, schema, trust)
        return open_dataset(resolved["data"], trust), str(error)


def assemble(
    config: FrozenConfigDict,
    trust: Sequence[str] = configs.EVERYONE,
    devices: Sequence[jax.Device] | None = None,
    dataset: Dataset | None = None,
    stream: Stream | None = None,
    members: Members | None = None,
) -> Experiment:
    """Builds the parts of a run from its resolved config.

    Nothing is computed on a device, and no parameter is drawn.

    Args:
        config: as `resolve` returns it.
        trust: packages whose factories the config may name.
        devices: the devices to use; default: all.
        dataset: default: opened as the config says.
        stream: of an incremental run.
        members: trials, which may take the place of the seeds; `config.seeds` has a value for each.

    Raises:
        UserError: the parts don't fit each other, the data or the devices.
    """
    dataset = dataset or open_dataset(config.data, trust)
    if "train" not in dataset.splits:
        there = ", ".join(dataset.splits)
        raise UserError(f"data ({config.data.name}): there is no split 'train', but {there}")
    try:
        return _assemble(config, trust, devices or jax.devices(), dataset, stream, members)
    except ValueError as error:
        raise UserError(str(error)) from error


def _balanced(c: FrozenConfigDict, dataset: Dataset, ranks: int) -> Dataset:
    """Returns the data set with training rows whose order gives devices equal work."""
    if c.program == "incremental":
        raise UserError("data.balance_length: a stream has an order of its own; leave it at 0")
    train = balancing.BalancedRows(
        dataset.splits["train"], c.data.batch_size, ranks, c.accumulation, c.data.balance_length
    )
    return dataset._replace(splits={**dataset.splits, "train": train})


def _assemble(
    c: FrozenConfigDict,
    trust: Sequence[str],
    devices: Sequence[jax.Device],
    dataset: Dataset,
    stream: Stream | None,
    members: Members | None,
) -> Experiment:
    mesh = meshes.create(devices, **c.mesh)
    kind = SCHEMA.kinds["islands"]
    method = configs.build(c.islands, kind, "islands", trust, islands.whole(mesh))
    splitting.check_batch(c, mesh, method)
    if c.data.balance_length:
        dataset = _balanced(c, dataset, meshes.batch_parallelism(mesh))
    train = dataset.splits["train"]
    model, task, trained = build_model(c, trust, dataset.spec)
    batch = stream.batch if stream else example_batch(train, c.data.batch_size)
    rules = layout.rules(c.sharding, model, task, batch, mesh)
    steps = stream.steps if stream else 0
    steps = steps or c.steps or math.ceil(c.epochs * len(train) / c.data.batch_size)
    rate = optimizing.learning_rate(c, trust, steps)
    platform = mesh.devices.flat[0].platform
    activations = splitting.activations(rules, mesh, method)
    ends = stream.ends if stream else (steps,)
    recipe = step.Recipe(
        model=model,
        task=task,
        optimizer=optimizing.optimizer(c, trust, rate, optimizing.trained_axes(model, trained)),
        learning_rate=rate.recorded,
        augment=_augment(c.data, trust, dataset.spec),
        parameters=trained,
        optimizer_eval_params=functools.partial(weights.eval_params, c.optimizer.name),
        accumulation=c.accumulation,
        averaging=optimizing.averaging(c),
        scale_loss=c.precision == "float16",
        log_every=c.log_every,
        placement=placement.Placement(platform, mesh, activations),
        learner=stream.learner if stream else learners.PLAIN,
        space=stream.space if stream else None,
        islands=islands.Islands(method, ends, mesh) if method else None,
    )
    plan, hyper = members or Members(None, {})
    if members:
        rebuild = functools.partial(_rebuilt, c, trust, dataset.spec, steps, recipe)
        recipe = recipe._replace(rebuild=rebuild)
    if plan is None:
        per_seed = stream.per_seed if stream else c.data.order == "per_seed"
        plan = seeds.plan(len(c.seeds), platform, mesh.shape["seed"], per_seed)
    one = jax.eval_shape(
        lambda hyper: step.init(recipe, batch, jnp.zeros((), jnp.uint32), {}, {}, hyper), hyper
    )
    splitting.check_islands(c, method, one)
    state = _laid_out(one, recipe, rules, mesh, plan.number)
    return Experiment(c, trust, mesh, plan, dataset, steps, recipe, batch, state)


def _rebuilt(
    c: FrozenConfigDict,
    trust: Sequence[str],
    spec: DataSpec,
    steps: int,
    recipe: step.Recipe,
    hyper: Mapping[str, Any],
) -> step.Recipe:
    """Returns the recipe with (traced) values for some of the config's dotted keys."""
    own = _with_values(c, hyper)
    rate = optimizing.learning_rate(own, trust, steps)
    axes = optimizing.trained_axes(recipe.model, recipe.parameters)
    changed = recipe._replace(
        learning_rate=rate.recorded,
        optimizer=optimizing.optimizer(own, trust, rate, axes),
        averaging=optimizing.averaging(own),
    )
    if not any(key.startswith("task.") for key in hyper):
        return changed
    task = configs.build(own.task, SCHEMA.kinds["task"], "task", trust, spec)
    return changed._replace(task=task)


def _laid_out(
    one: TrainState, recipe: step.Recipe, rules: partition_rules.Rules, mesh: Mesh, number: int
) -> TrainState:
    """Returns the abstract state of a number of seeds, with its shardings, from that of one."""
    shardings = layout.state_shardings(
        one,
        recipe.parameters.axes(one.params),
        recipe.model.axes,
        recipe.optimizer,
        rules,
        mesh,
        number > 1,
        recipe.islands,
    )
    if number > 1:
        one = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((number, *leaf.shape), leaf.dtype), one
        )
    return layout.abstract(one, shardings)


def build_model(
    c: FrozenConfigDict, trust: Sequence[str], spec: DataSpec
) -> tuple[FunctionalModel, Task, parameters.Parameters]:
    """Returns the model of a resolved config, its task, and how its parameters are trained.

    Raises:
        UserError: the model or the task refuses its keys or the data.
    """
    dtype = DTYPES[c.precision]
    kind = SCHEMA.kinds["model"]
    model = functional(lambda rngs: configs.build(c.model, kind, "model", trust, rngs, spec, dtype))
    task = configs.build(c.task, SCHEMA.kinds["task"], "task", trust, spec)
    trained = parameters.create(
        c.init_from_rules.freeze,
        c.adapters.rank,
        c.adapters.alpha,
        c.adapters.paths,
        model.params,
        model.axes,
    )
    return model, task, trained


def check_factories(c: FrozenConfigDict, trust: Sequence[str], parts: Experiment) -> None:
    """Makes a resolved config's schedule, optimizer and task, so that they refuse their keys.

    Args:
        c: resolved.
        trust: packages whose factories the config may name.
        parts: of an experiment with the same model and data.

    Raises:
        UserError: one of them refuses its keys.
    """
    recipe = parts.recipe
    rate = optimizing.learning_rate(c, trust, parts.steps)
    axes = optimizing.trained_axes(recipe.model, recipe.parameters)
    optimizing.optimizer(c, trust, rate, axes)
    configs.build(c.task, SCHEMA.kinds["task"], "task", trust, parts.dataset.spec)


def _with_values(c: FrozenConfigDict, hyper: Mapping[str, Any]) -> ConfigDict:
    """Returns the config with (traced) values for some of its dotted keys."""
    changed = ConfigDict(configs.thaw(c))
    with changed.ignore_type():
        for key, value in hyper.items():
            *blocks, last = key.split(".")
            functools.reduce(lambda block, name: block[name], blocks, changed)[last] = value
    return changed


def _augment(data: Mapping, trust, spec):
    kind = configs.Kind(AUGMENTATIONS, takes="spec", makes=Callable)
    for name in data["augmentation_options"]:
        if name not in data["augmentations"]:
            raise UserError(
                f"data.augmentation_options.{name}: {name!r} is not one of data.augmentations "
                f"{tuple(data['augmentations'])}"
            )
    functions = []
    for name in data["augmentations"]:
        block = {"name": name, **data["augmentation_options"].get(name, {})}
        schema = configs.Schema(configs.NoSettings, {}, {"augmentation": kind})
        resolved = configs.resolve({"augmentation": block}, schema, trust)
        functions.append(
            configs.build(resolved["augmentation"], kind, "data.augmentations", trust, spec)
        )

    def augment(key, batch):
        for i, function in enumerate(functions):
            batch = function(jax.random.fold_in(key, i), batch)
        return batch

    return augment


def example_batch(source: Any, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a batch of a split as `jax.ShapeDtypeStruct`s, as the step sees it."""
    arrays = {name: jnp.asarray(value) for name, value in source[0].items()}
    shapes = jax.eval_shape(feeds.normalise, {k: v[None] for k, v in arrays.items()})
    return {
        name: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in shapes.items()
    }
