"""REPAIR: gives a merged model's units the statistics that they have in the models it comes from.

Jordan et al. 2022 (arXiv 2211.08403): units of an average fire with less variance than those of its
ends, layer by layer less. Each unit's mean and standard deviation before its activation are set to
the mean of the ends'. A network with batch norm has its statistics measured anew; elsewhere the
correction, which is affine, is folded into the layer that gives the units: kernel and bias, or
scale and bias of a norm. Without a bias there is no place for the mean, and the standard deviation
alone is set. The layers of a stack are corrected one by one.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from lamina.models import axes as logical
from lamina.models.functional import FunctionalModel
from lamina.models.stack import Stack
from lamina.platform.checkpoints.names import flatten, nest, path_name
from lamina.platform.errors import UserError
from lamina.platform.merging.symmetries import joined, separate

Tree = Any


class Statistics(NamedTuple):
    """Of a layer's outputs over examples and places: `[*outputs]` each, float32."""

    mean: jax.Array
    std: jax.Array


class Affine(NamedTuple):
    """What a layer's outputs are multiplied by, and what is added: `[*outputs]` each, float32."""

    scale: jax.Array
    shift: jax.Array


class Layer(NamedTuple):
    """A hidden layer: the last part of its outputs' computation is `x * factor + bias`.

    Attributes:
        path: in the module whose stacks are unrolled.
        parameters: the name that its parameters begin with.
        place: which layer of a stack it is, or () outside of stacks.
        factor: "kernel", or "scale" of a norm.
        bias: whether it has one.
        outputs: how many dimensions its units have.
    """

    path: tuple[Any, ...]
    parameters: str
    place: tuple[Any, ...]
    factor: str
    bias: bool
    outputs: int

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(map(str, self.path))


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

    It goes through the inputs as often as there are layers, whatever the number of examples: a
    layer's correction needs its statistics over all of them, with the layers before it corrected,
    before any goes on. One pass would do only with the activations of all inputs at once in memory.
    Layers in a loop of the model's own, as the cell of an RNN, stay as they are.

    Args:
        model: of all three.
        one: the model at alpha = 0; trees as `symmetries.joined` makes them.
        other: the one at 1, its units matched to the first's.
        merged: between them.
        inputs: training examples `[batches, B, ...]`.
        alpha: how much of `other` is in `merged`. Default: 0.5.

    Raises:
        UserError: the model has neither batch norm nor a hidden layer with a kernel or a norm.
    """
    params, model_state = separate(merged)
    if model_state:
        return joined(params, reset_statistics(model, params, model_state, inputs))
    order: list[str] = []  # of the computation, which jit doesn't keep

    @jax.jit
    def measure(params: Tree, corrections: dict[str, Affine]) -> dict[str, Statistics]:
        found = layer_statistics(model, params, inputs, corrections)
        order[:] = found
        return found

    ends = [measure(separate(end)[0], {}) for end in (one, other)]
    if not order:
        raise UserError(
            "this model can't be repaired: it has no batch norm, and no hidden layer with a kernel "
            "or a norm"
        )
    layers = {layer.name: layer for layer in _layers(model)}
    turns = {name: number for number, name in enumerate(order)}
    wanted = jax.tree.map(lambda x, y: (1 - alpha) * x + alpha * y, *ends)

    def correct(number: jax.Array, known: dict[str, Affine]) -> dict[str, Affine]:
        now = measure(params, known)
        corrected = {}
        for name in known:
            mean, std = now[name]
            scale = jnp.where(std > 0, wanted[name].std / jnp.where(std > 0, std, 1), 1)
            shift = wanted[name].mean - mean * scale
            shift = shift if layers[name].bias else jnp.zeros_like(shift)
            turn = number == turns[name]
            corrected[name] = Affine(
                jnp.where(turn, scale, known[name].scale), jnp.where(turn, shift, known[name].shift)
            )
        return corrected

    as_is = lambda s: Affine(jnp.ones_like(s.mean), jnp.zeros_like(s.mean))
    nothing = {name: as_is(statistics) for name, statistics in wanted.items()}
    found = jax.lax.fori_loop(0, len(nothing), correct, nothing)
    return nest(_folded(flatten(params), {layers[name]: part for name, part in found.items()}))


def _folded(flat: dict[str, jax.Array], corrections: dict[Layer, Affine]) -> dict[str, jax.Array]:
    """Returns the parameters with corrections in them."""
    flat = {name: jnp.asarray(leaf) for name, leaf in flat.items()}
    for layer, (scale, shift) in corrections.items():
        factor, bias = f"{layer.parameters}/{layer.factor}", f"{layer.parameters}/bias"
        flat[factor] = flat[factor].at[layer.place].multiply(scale.astype(flat[factor].dtype))
        if layer.bias:
            old = flat[bias][layer.place]
            flat[bias] = flat[bias].at[layer.place].set((old * scale + shift).astype(old.dtype))
    return flat


def layer_statistics(
    model: FunctionalModel,
    params: Tree,
    inputs: jax.Array,
    corrections: Mapping[str, Affine] = MappingProxyType({}),
) -> dict[str, Statistics]:
    """Returns the statistics of the outputs of each hidden layer.

    Args:
        model: without batch statistics.
        params: its parameters.
        inputs: `[batches, B, ...]`.
        corrections: of layers' outputs, by their paths. Default: none.

    Returns:
        A layer's path to its statistics, in the order of the computation; the layers of a stack
        are numbered.
    """
    layers, names = _layers(model), []

    def moments(batch: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        seen: dict[str, list[tuple[jax.Array, jax.Array]]] = {}
        module, _ = _unrolled(model.bind(params, {}))
        for layer in layers:
            inner, correction = _get(module, layer.path), corrections.get(layer.name)
            _replace(module, layer.path, _Recorder(inner, layer, correction, seen))
        module(batch)
        names[:] = seen  # a layer that is called several times has the moments of all calls
        return [jax.tree.map(lambda *x: jnp.stack(x), *calls) for calls in seen.values()]

    each = jax.lax.map(moments, inputs)
    return dict(zip(names, (_pooled(*found) for found in each), strict=True))


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
    """A layer whose outputs are corrected, and their moments kept."""

    def __init__(self, inner: Any, layer: Layer, correction: Affine | None, seen: dict[str, list]):
        outside = core.get_opaque_trace_state(convention="nnx")

        def after(value: jax.Array) -> jax.Array:
            if core.get_opaque_trace_state(convention="nnx") != outside:
                return value  # in a loop of the model's own, which no moment leaves
            wide = value.astype(jnp.float32)
            over = tuple(range(wide.ndim - layer.outputs))
            if correction is not None:
                scale, shift = (jnp.expand_dims(part, over) for part in correction)
                wide = wide * scale + shift
            seen.setdefault(layer.name, []).append((wide.mean(over), wide.var(over)))
            return wide.astype(value.dtype)

        self.inner, self.after = inner, after

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return self.after(self.inner(*args, **kwargs))


def _unrolled(module: nnx.Module) -> tuple[nnx.Module, list[tuple[Any, ...]]]:
    """Returns a module whose scanned stacks run their blocks one by one, and where those are."""
    stacks = [(path, each) for path, each in nnx.iter_modules(module) if isinstance(each, Stack)]
    for _, stack in stacks:
        stack.remat = "none"
    scanned = [(path, stack) for path, stack in stacks if stack.scan]
    for _, stack in scanned:
        graph, state = nnx.split(stack.blocks)
        blocks = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(stack.depth)]
        stack.blocks = nnx.List([nnx.merge(graph, block) for block in blocks])
        stack.scan = False
    return module, [(*path, "blocks") for path, _ in scanned]


def _layers(model: FunctionalModel) -> list[Layer]:
    """Returns the hidden layers, as they are in an unrolled module."""
    axes: dict[str, Any] = {
        path_name(path): names
        for path, names in jax.tree_util.tree_flatten_with_path(
            model.axes, is_leaf=lambda x: type(x) is tuple
        )[0]
    }
    found: list[Layer] = []

    def look(params: Tree) -> None:
        module, scanned = _unrolled(model.bind(params, {}))
        for path, _ in nnx.iter_modules(module):
            inside = next((len(s) for s in scanned if path[: len(s)] == s != path), len(path))
            place, rest = path[inside : inside + 1], path[inside + 1 :]
            name = "/".join(map(str, (*path[:inside], *rest)))
            factor = next((f for f in ("kernel", "scale") if f"{name}/{f}" in axes), None)
            if factor is None:
                continue
            names = axes[f"{name}/{factor}"][len(place) :]
            inputs = logical.matrix_split(names)[1] if factor == "kernel" else 0
            if names[-1] not in (logical.CLASSES, logical.VOCAB):
                bias = f"{name}/bias" in axes
                found.append(Layer(path, name, place, factor, bias, len(names) - inputs))

    jax.eval_shape(look, model.params)
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


def _pooled(means: jax.Array, variances: jax.Array) -> Statistics:
    """Returns the statistics of batches of one size `[batches, calls, ...]` taken together."""
    return Statistics(means.mean((0, 1)), jnp.sqrt(variances.mean((0, 1)) + means.var((0, 1))))
