"""Reads what a run has trained: the model and its weights, without the data it was trained on."""

import json
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from ml_collections import FrozenConfigDict

from lamina.models.functional import FunctionalModel, functional
from lamina.models.spec import DataSpec
from lamina.platform import config as configs
from lamina.platform.checkpoints import names, restoring
from lamina.platform.checkpoints.manifest import ArrayRecord
from lamina.platform.checkpoints.restoring import Restored
from lamina.platform.errors import UserError
from lamina.platform.optimizers import weights
from lamina.platform.reporting import added, folder, storage
from lamina.platform.training import experiment, optimizing, seeds
from lamina.platform.training.tasks import Task

_LONG = 2**30
"""Steps of a run whose length is given in epochs, where only the state's structure matters."""


class Trained(NamedTuple):
    """A trained model.

    Attributes:
        config: of its run, as `read_config` gives it.
        spec: what the model fits.
        model: its pure functions.
        task: what it was trained for.
        params: all its parameters, those to evaluate (moving average, adapters merged in).
        model_state: what else it keeps, such as batch statistics.
        seed: the value of its seed.
        step: the step of the checkpoint.
        notes: on newer checkpoints that are damaged.
    """

    config: FrozenConfigDict
    spec: DataSpec
    model: FunctionalModel
    task: Task
    params: Any
    model_state: Any
    seed: int
    step: int
    notes: tuple[str, ...]


def read(
    workdir: str | os.PathLike,
    *,
    seed: int | None = None,
    step: int | None = None,
    trust: Sequence[str] = (),
    shardings: Callable[[str, ArrayRecord], Sharding | None] | None = None,
) -> Trained:
    """Reads the weights of a run's newest good checkpoint.

    Args:
        workdir: a run folder, or one of its checkpoints (`runs/x/checkpoints/300`).
        seed: the value of a seed of the run; default: its first.
        step: which checkpoint; default: the newest that verifies.
        trust: packages whose factories the run's config may name.
        shardings: where a stored array goes, from its name and record, as for
            `restoring.restore_subtree`; default: the default device.

    Raises:
        UserError: there is no such run, checkpoint or seed, or it is damaged.
    """
    root, step = _checkpoint_of(os.fspath(workdir), step)
    config = read_config(root, trust)
    if seed is not None and seed not in config.seeds:
        raise UserError(f"{root} has no seed {seed}: its seeds are {tuple(config.seeds)}")
    chosen = config.seeds[0] if seed is None else seed
    root = os.fspath(added.find(root, chosen) or root)
    checkpoints = os.path.join(root, folder.CHECKPOINTS)
    parts = ("params", "frozen?", "model_state?", "ema?")
    found = restoring.restore_subtree(checkpoints, parts, step=step, shardings=shardings)
    spec = _spec(found, root)
    model, task, parameters = experiment.build_model(config, trust, spec)
    saved_seeds = list(found.extra.get("seeds", config.seeds))
    one = seeds.take(found.state, len(saved_seeds), saved_seeds.index(chosen))
    trained = jax.tree.map(jnp.asarray, one["params"])
    average = optimizing.averaging(config)
    if average is not None:
        kept = jax.tree.map(jnp.asarray, one["ema"])
        trained = average.weights(kept, trained, jnp.int32(found.step))
    axes = optimizing.trained_axes(model, parameters)
    rate = optimizing.learning_rate(config, trust, config.steps or _LONG)
    optimizer = optimizing.optimizer(config, trust, rate, axes)
    abstract = jax.eval_shape(optimizer.init, trained)
    if weights.keeps_average(abstract) and average is None:
        index = saved_seeds.index(chosen)
        state = restoring.restore_subtree(
            checkpoints, "optimizer_state", step=found.step, shardings=shardings
        ).state
        state = seeds.take(state["optimizer_state"], len(saved_seeds), index)
        state = names.unflatten(jax.tree.map(jnp.asarray, names.flatten(state)), abstract)
        trained = weights.eval_params(config.optimizer.name, state, trained)
    params = parameters.combine(trained, jax.tree.map(jnp.asarray, one.get("frozen", {})))
    state = jax.tree.map(jnp.asarray, one.get("model_state", {}))
    return Trained(config, spec, model, task, params, state, chosen, found.step, found.notes)


def read_config(workdir: str, trust: Sequence[str] = ()) -> FrozenConfigDict:
    """Returns the config of a run, as that of one which trains the same model on its data at once.

    Args:
        workdir: the run folder.
        trust: packages whose factories the config may name.

    Raises:
        UserError: there is no such run, or its config is damaged.
    """
    text = storage.read_bytes(storage.as_path(workdir) / folder.CONFIG)
    if text is None:
        raise UserError(f"{workdir} is no run folder: it has no {folder.CONFIG}")
    where = os.path.join(workdir, folder.CONFIG)
    written = configs.from_json(text.decode("utf-8", "replace"), where)
    program = written.get("program", "train")
    if program not in ("train", "incremental"):
        inside = sorted(
            os.path.relpath(path.parent, workdir)
            for depth in ("*", "*/*")
            for path in storage.as_path(workdir).glob(f"{depth}/{folder.STATUS}")
        )
        models = f": its models are in {', '.join(inside[:4])}" if inside else ""
        raise UserError(f"{workdir} is of the program {program!r}, not one training{models}")
    # What an incremental run has besides a model is no matter here, nor how it was dispatched.
    kept = {key: value for key, value in written.items() if key not in ("stream", "learner")}
    schema = experiment.SCHEMA._replace(contradictions=lambda config: ())
    return configs.resolve({**kept, "program": "train"}, schema, trust)


def describe_spec(spec: DataSpec) -> dict[str, Any]:
    """Returns a spec as JSON can hold it; it is saved with each checkpoint."""
    return {
        "input_shape": list(spec.input_shape),
        "input_dtype": str(spec.input_dtype),
        "outputs": spec.outputs,
    }


def describe(found: Trained) -> dict[str, str]:
    """Returns what a safetensors file with these weights says of them in its header."""
    return {
        "format": "lamina",
        "model": json.dumps(configs.thaw(found.config.model)),
        "spec": json.dumps(describe_spec(found.spec)),
        "step": str(found.step),
        "seed": str(found.seed),
    }


def described(
    header: Mapping[str, str], where: str, trust: Sequence[str] = ()
) -> tuple[FunctionalModel, DataSpec]:
    """Returns the model that `describe` told of, without its weights.

    Args:
        header: what a file says of itself.
        where: the file, for messages.
        trust: packages whose factories the description may name.

    Raises:
        UserError: it tells of no model, or of none that there is.
    """
    if not {"model", "spec"} <= set(header):
        raise UserError(
            f"{where} doesn't say what model it is of: a file of `lamina export` or `lamina merge` "
            "of runs does, or give the run"
        )
    kind = experiment.SCHEMA.kinds["model"]
    try:
        data = _spec_of(json.loads(header["spec"]))
        if min(*data.input_shape, data.outputs) < 1:
            raise ValueError("a size is not positive")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is damaged: it doesn't say what its model fits") from error
    schema = configs.Schema(configs.NoSettings, {}, {"model": kind})
    try:
        block = configs.resolve({"model": configs.from_json(header["model"])}, schema, trust).model
        build = lambda rngs: configs.build(block, kind, "model", trust, rngs, data, jnp.float32)
        return functional(build), data
    except UserError as error:
        raise UserError(f"{where} tells of a model that can't be made: {error}") from error


def _spec(found: Restored, root: str) -> DataSpec:
    try:
        return _spec_of(found.extra["spec"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint of step {found.step} in {root} doesn't say what data its model fits: "
            "it was saved by something else"
        ) from error


def _spec_of(plain: Mapping[str, Any]) -> DataSpec:
    """Returns what `describe_spec` told of."""
    shape = tuple(map(operator.index, plain["input_shape"]))
    dtype = jnp.dtype(plain["input_dtype"]).name
    return DataSpec(shape, dtype, operator.index(plain["outputs"]))


def _checkpoint_of(path: str, step: int | None) -> tuple[str, int | None]:
    match = re.fullmatch(rf"(?:(.*)/)?{folder.CHECKPOINTS}/(\d+)/*", path)
    return (match[1] or ".", int(match[2])) if match else (path, step)
