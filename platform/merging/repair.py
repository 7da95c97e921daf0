"""REPAIR: gives a merged model's units the statistics that they have in the models it comes from.

Jordan et al. 2022 (arXiv 2211.08403): units of an average fire with less variance than those of its
ends, layer by layer less. Each unit's mean and standard deviation before its activation are set to
the mean of the ends'. A network with batch norm has its statistics measured anew; elsewhere the
correction, which is affine, is folded into the layer's kernel and bias.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models import axes as logical
from lamina.models.functional import FunctionalModel
from lamina.models.stack import Stack
from lamina.platform.checkpoints.names import flatten, nest
from lamina.platform.errors import UserError
from lamina.platform.merging.symmetries import joined, separate

Tree = Any


class Statistics(NamedTuple):
    """Of a layer's outputs over examples and places: `[*outputs]` each, float32."""

    mean: jax.Array
    std: jax.Array


def repair(
    model: FunctionalModel,
    one: Tree,
    other: Tree,
    merged: Tree,
    inputs: jax.Array,
    *,
    alpha: float | jax.Array = 0.5,
) -> Tree:
    """Returns a merged model whose units have the statistics of its ends.

    Args:
        model: of all three.
        one: the model at alpha = 0; trees as `symmetries.joined` makes them.
        other: the one at 1, its units matched to the first's.
        merged: between them.
        inputs: training examples `[batches, B, ...]`.
        alpha: how much of `other` is in `merged`. Default: 0.5.

    Raises:
        UserError: the model has neither batch norm nor layers with a bias that can be corrected
            (the layers of a stack that is run by a scan, or those without a bias, can't).
    """
    params, model_state = separate(merged)
    if model_state:
        return joined(params, reset_statistics(model, params, model_state, inputs))
    measure = jax.jit(lambda tree: layer_statistics(model, tree, inputs))
    ends = measure(separate(one)[0]), measure(separate(other)[0])
    if not ends[0]:
        raise UserError(
            "this model can't be repaired: it has no batch norm, and no layer with a bias outside "
            "of stacks"
        )
    flat = flatten(params)
    for layer in ends[0]:  # in the order of the computation: each sees those before it corrected
        now = measure(nest(flat))[layer]
        a, b = (end[layer] for end in ends)
        wanted = Statistics(*((1 - alpha) * x + alpha * y for x, y in zip(a, b, strict=True)))
        kernel, bias = f"{layer}/kernel", f"{layer}/bias"
        scale = jnp.where(now.std > 0, wanted.std / jnp.where(now.std > 0, now.std, 1), 1)
        flat[bias] = (flat[bias] - now.mean) * scale + wanted.mean
        flat[kernel] = flat[kernel] * scale.reshape(
            (1,) * (flat[kernel].ndim - scale.ndim) + scale.shape
        )
    return nest(flat)


def layer_statistics(
    model: FunctionalModel, params: Tree, inputs: jax.Array
) -> dict[str, Statistics]:
    """Returns the statistics of the outputs of each hidden layer with a kernel and a bias.

    Args:
        model: without batch statistics.
        params: its parameters.
        inputs: `[batches, B, ...]`.

    Returns:
        A layer's path to its statistics, in the order of the computation.
    """
    paths: list[str] = []

    def sums(batch: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        seen: list[tuple[str, jax.Array]] = []
        module = model.bind(params, {})
        for path, layer in _layers(model, module):
            _replace(module, path, _Recorder(layer, "/".join(map(str, path)), seen))
        module(batch)
        paths[:] = [name for name, _ in seen]
        return [_moments(flatten(params)[f"{name}/bias"].ndim, out) for name, out in seen]

    each = jax.lax.map(sums, inputs)
    return dict(zip(paths, (_pooled(*moments) for moments in each), strict=True))


def reset_statistics(
    model: FunctionalModel, params: Tree, model_state: Tree, inputs: jax.Array
) -> Tree:
    """Returns the batch statistics of a model measured anew, equal weight to each batch.

    In evaluation mode but for batch norm: nothing is dropped out. A module's running statistics may
    move by any fraction, which is measured: with old ones r the new ones are `m r + (1 - m) x`.

    Args:
        model: with batch norm.
        params: its parameters.
        model_state: which statistics there are; their values don't matter.
        inputs: `[batches, B, ...]`.
    """

    def after(batch: jax.Array, old: float) -> Tree:
        state = jax.tree.map(lambda leaf: jnp.full_like(leaf, old), model_state)
        module = model.bind(params, state)
        module.set_attributes(use_running_average=False, raise_if_not_found=False)
        module(batch)
        found = {
            "/".join(map(str, path)): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
            for path, leaf in nnx.to_flat_state(nnx.state(module))
        }
        return {name: found[name] for name in flatten(model_state)}

    def one(batch: jax.Array) -> Tree:
        low, high = after(batch, 0.0), after(batch, 1.0)
        return {name: low[name] / (1 - (high[name] - low[name])) for name in low}

    each = jax.jit(lambda inputs: jax.lax.map(one, inputs))(inputs)
    means = {name: value.mean(0) for name, value in each.items()}
    for name in means:
        folder, _, last = name.rpartition("/")
        mean = f"{folder}/mean" if folder else "mean"
        if last == "var" and mean in each:  # of all batches: also that between them
            means[name] = means[name] + each[mean].var(0)
    return nest({name: means[name] for name in flatten(model_state)})


class _Recorder(nnx.Module):
    """A layer that keeps what it gives."""

    def __init__(self, layer: Any, name: str, seen: list[tuple[str, jax.Array]]):
        self.layer, self.keep = layer, lambda value: seen.append((name, value))

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        value = self.layer(*args, **kwargs)
        self.keep(value)
        return value


def _layers(model: FunctionalModel, module: nnx.Module) -> list[tuple[tuple, Any]]:
    """Returns the hidden layers with a kernel and a bias, outside of stacks."""
    found = []
    names: Mapping[str, Any] = {
        "/".join(str(part.key) for part in path): value
        for path, value in jax.tree_util.tree_flatten_with_path(
            model.axes, is_leaf=lambda x: type(x) is tuple
        )[0]
    }
    for path, layer in nnx.iter_modules(module):
        kernel = "/".join(map(str, (*path, "kernel")))
        if getattr(layer, "bias", None) is None or kernel not in names:
            continue
        last = names[kernel][-1]
        stacked = any(isinstance(_get(module, path[:i]), Stack) for i in range(len(path)))
        if not stacked and last not in (logical.CLASSES, logical.VOCAB):
            found.append((path, layer))
    return found


def _get(module: Any, path: tuple) -> Any:
    for part in path:
        module = module[part] if isinstance(part, int) else getattr(module, part)
    return module


def _replace(module: Any, path: tuple, new: Any) -> None:
    parent, last = _get(module, path[:-1]), path[-1]
    if isinstance(last, int):
        parent[last] = new
    else:
        setattr(parent, last, new)


def _moments(outputs: int, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance over all dimensions but the last `outputs`."""
    over = tuple(range(value.ndim - outputs))
    value = value.astype(jnp.float32)
    return value.mean(over), value.var(over)


def _pooled(means: jax.Array, variances: jax.Array) -> Statistics:
    """Returns the statistics of batches of one size taken together."""
    return Statistics(means.mean(0), jnp.sqrt(variances.mean(0) + means.var(0)))
