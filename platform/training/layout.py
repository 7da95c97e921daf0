"""Where the train state lies: a sharding for each of its arrays."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import FrozenConfigDict

from lamina.models import axes as logical_axes
from lamina.models import placement
from lamina.models.functional import FunctionalModel
from lamina.platform.errors import UserError
from lamina.platform.optimizers.islands.method import Rounds
from lamina.platform.training.islands import Islands
from lamina.platform.training.parameters import flat, nested
from lamina.platform.training.state import TrainState
from lamina.platform.training.tasks import Task
from lamina.sharding import auto
from lamina.sharding import rules as partition_rules
from lamina.sharding.mesh import BATCH_AXES


def rules(
    c: FrozenConfigDict, model: FunctionalModel, task: Task, batch: Any, mesh: Mesh
) -> partition_rules.Rules:
    """Returns the rules of a `sharding` block.

    Args:
        c: the block.
        model: to which they apply.
        task: says how the model is called; with "auto" it is traced.
        batch: as `jax.ShapeDtypeStruct`s.
        mesh: the mesh.

    Raises:
        UserError: it names logical axes that the model hasn't.
        ValueError: it names no preset.
    """
    named = {name for axes in flat(model.axes).values() for name in axes if name}
    known = {
        "axes": named | logical_axes.VOCABULARY | {partition_rules.UNNAMED},
        "activations": placement.VOCABULARY,
    }
    for key, names in known.items():
        for axis in c[key]:
            if axis not in names:
                having = ", ".join(sorted(named if key == "axes" else names))
                raise UserError(
                    f"sharding.{key}.{axis}: the model has no axis {axis!r}, it has {having}"
                )
    found = partition_rules.preset(c.rules, c.axes, c.paths, c.activations)
    if c.rules != "auto":
        return found

    def forward(params: Any, state: Any, batch: Any) -> Any:
        arguments, options = task.inputs(batch)
        return model.apply(nested(params), state, *arguments, train=False, **options)[0]

    arguments = (model.model_state, batch)
    ways = mesh.shape["tensor"]
    return found._replace(
        derived=auto.layout(forward, flat(model.params), arguments, ways, "tensor")
    )


def state_shardings(
    state: TrainState,
    trained_axes: Any,
    axes: Any,
    optimizer: optax.GradientTransformation,
    chosen: partition_rules.Rules,
    mesh: Mesh,
    seed_axis: bool,
    islands: Islands | None = None,
) -> TrainState:
    """Returns the sharding of every array of a train state.

    Parameters follow the rules; so do the optimizer's moments and the moving average of them, for
    which a preset may have rules of its own. Everything else is copied to every device.

    Args:
        state: of one seed, as `jax.ShapeDtypeStruct`s.
        trained_axes: logical axes of what is trained (the parameters, or their adapters).
        axes: logical axes of the model's parameters, nested as they are.
        optimizer: whose state it is.
        chosen: where the dimensions of parameters go.
        mesh: the mesh.
        seed_axis: whether the state has a leading seed axis, split over the mesh axis `seed`.
        islands: whose own parts of the state are split over the mesh axis `replica`.

    Raises:
        ValueError: a dimension doesn't divide, a rule names an axis that the mesh lacks or a path
            that no parameter has, or explicit rules split a parameter twice along one mesh axis.
    """
    whole: Any = partition_rules.replicated(mesh)
    logical = flat(axes) | flat(trained_axes)

    paths = [*flat(state.params), *flat(state.frozen)]
    for pattern in partition_rules.unused_paths(chosen, paths):
        raise ValueError(f"sharding.paths: {pattern!r} is found in the path of no parameter")

    def of_params(tree: Any, state: bool = False) -> Any:
        return nested({name: sharding(name, leaf, state) for name, leaf in flat(tree).items()})

    def sharding(name: str, leaf: Any, state: bool) -> NamedSharding:
        names = logical.get(name)
        if names is None or len(names) != len(leaf.shape):
            names = (None,) * len(leaf.shape)
        spec = partition_rules.partition_spec(names, leaf.shape, chosen, mesh, name, state=state)
        return NamedSharding(mesh, spec)

    def of_average(tree: Any) -> Any:
        params = flat(state.params)

        def of(name: str, leaf: Any) -> NamedSharding:
            like = sharding(name, params[name], True)
            several = len(leaf.shape) - len(params[name].shape)
            return NamedSharding(mesh, P(*[None] * several, *like.spec))

        return nested({name: of(name, leaf) for name, leaf in flat(tree).items()})

    def moments(optimizer: optax.GradientTransformation, tree: Any) -> Any:
        like = of_params(state.params, state=True)
        return _of_optimizer(optimizer, tree, state.params, like, whole)

    def of_learner(tree: Any) -> Any:
        like = flat(of_params(state.params, state=True))
        return _of_learner(tree, state, like, mesh, islands is not None)

    everywhere = jax.tree.map(lambda leaf: whole, state)
    own: dict[str, Any] = {}
    outer = optimizer
    if islands is not None:
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), state.islands)
        own = jax.tree.map(lambda leaf: whole, one) | {"learner": of_learner(one["learner"])}
        if isinstance(islands.method, Rounds):
            outer = islands.method.outer
            own["params"] = of_params(one["params"])
            own["optimizer_state"] = moments(optimizer, one["optimizer_state"])
        else:
            own["momentum"] = moments(islands.method.transformation, one["momentum"])
        own = jax.tree.map(lambda s: _leading(s, mesh, "replica"), own)
    shardings = TrainState(
        step=whole,
        seed=whole,
        params=of_params(state.params),
        frozen=of_params(state.frozen),
        model_state=everywhere.model_state,
        optimizer_state=moments(outer, state.optimizer_state),
        ema=of_average(state.ema),
        loss_scale=everywhere.loss_scale,
        metrics=everywhere.metrics,
        nonfinite_step=whole,
        learner=of_learner(state.learner),
        islands=own,
        hyper=everywhere.hyper,
    )
    return jax.tree.map(lambda s: _leading(s, mesh, "seed"), shardings) if seed_axis else shardings


def _of_optimizer(
    optimizer: optax.GradientTransformation, tree: Any, params: Any, like: Any, whole: NamedSharding
) -> Any:
    """Returns the shardings of an optimizer's state.

    Args:
        optimizer: whose state it is.
        tree: the state.
        params: its parameters.
        like: a sharding for each: moments of a parameter's shape have it.
        whole: of everything else.
    """

    def place(leaf: Any, sharding: NamedSharding, param: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # a parameter of another part of the optimizer
            return leaf
        return sharding if leaf.shape == param.shape else whole

    return optax.tree_utils.tree_map_params(
        optimizer,
        place,
        tree,
        like,
        params,
        transform_non_params=lambda leaf: whole,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )


def _of_learner(
    tree: Any, state: TrainState, params: Mapping[str, Any], mesh: Mesh, on_island: bool
) -> Any:
    """Returns the shardings of a learner's state.

    What it keeps for each parameter lies as the parameter does, the slots of a memory are split
    like a batch where they divide, and all else is copied.
    """
    whole = partition_rules.replicated(mesh)
    axes = tuple(axis for axis in BATCH_AXES if not (on_island and axis == "replica"))
    ways = math.prod(mesh.shape[axis] for axis in axes)
    shapes = {name: leaf.shape for name, leaf in flat(state.params).items()}

    def of(name: str, leaf: Any) -> NamedSharding:
        if name.startswith("memory/rows/"):
            return NamedSharding(mesh, P(axes)) if leaf.shape[0] % ways == 0 else whole
        parts = name.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        like = next((end for end in ends if shapes.get(end) == leaf.shape), None)
        return params[like] if like else whole

    named = lambda path, leaf: of(partition_rules.path_name(path), leaf)
    return jax.tree.map_with_path(named, tree)


def _leading(sharding: NamedSharding, mesh: Mesh, axis: str) -> NamedSharding:
    """Returns the sharding of several of an array, along a mesh axis."""
    return NamedSharding(mesh, P(axis if mesh.shape[axis] > 1 else None, *sharding.spec))


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of a tree of `jax.ShapeDtypeStruct`s with shardings, on one device."""

    def size(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape)
        count = 1
        for extent in shape:
            count *= extent
        return count * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def abstract(tree: Any, shardings: Any) -> Any:
    """Returns `jax.ShapeDtypeStruct`s with shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
