"""A Flax NNX module as pure functions over nested dicts: what the platform trains.

``functional(make)`` builds the module once, abstractly, and returns ``init`` and ``apply`` that
``jit``, ``vmap`` (also over keys) and ``grad`` treat as any pure function. Parameters and other
state are nested plain dicts with string keys, so that they serialise, shard and merge without
knowing Flax.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models import axes as logical
from lamina.models.spec import Output

Tree = dict[str, Any]
Path = tuple[str | int, ...]


class FunctionalModel(NamedTuple):
    """A module as pure functions.

    Attributes:
        init: ``key -> (params, model_state)``, nested dicts with string keys. ``model_state``
            holds what is neither parameter nor random state, as batch norm's running statistics.
        apply: ``(params, model_state, *args, train, key=None, **kwargs) -> (Output, model_state)``.
            ``key`` drives dropout. A module that returns a bare array is wrapped in ``Output``.
        bind: ``(params, model_state) -> nnx.Module`` in eval mode, callable.
        axes: the tree of ``params`` with tuples of logical axis names as leaves.
        params: the tree of ``params`` with ``jax.ShapeDtypeStruct`` leaves.
        model_state: the same for ``model_state``.
    """

    init: Callable[[jax.Array], tuple[Tree, Tree]]
    apply: Callable[..., tuple[Any, Tree]]
    bind: Callable[[Tree, Tree], nnx.Module]
    axes: Tree
    params: Tree
    model_state: Tree


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> FunctionalModel:
    """Turns a module into pure functions.

    Lists of modules (``nnx.List``) have integer keys in Flax and string keys here. Random streams
    that a module stores itself are no parameters: ``apply`` sets them anew from ``key`` on each
    call. Modules need no logical axes and no ``rngs`` argument in ``__call__``.

    Args:
        make: builds the module from ``nnx.Rngs``; called once here and once per ``init``.

    Returns:
        A ``FunctionalModel``.

    Raises:
        ValueError: at the call of ``apply`` with ``train=True`` and no key, if the module stores
            random streams.

    Example:
        >>> model = functional(lambda rngs: nnx.Linear(4, 2, rngs=rngs))
        >>> params, state = model.init(jax.random.key(0))
        >>> output, state = model.apply(params, state, jnp.ones((3, 4)), train=False)
        >>> sorted(params), output.logits.shape
        (['bias', 'kernel'], (3, 2))
    """

    def build(key: jax.Array) -> nnx.Module:
        with nnx.use_eager_sharding(False):
            return make(nnx.Rngs(key))

    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(lambda: build(jax.random.key(0)))
        module.eval()
        eval_graph, abstract = nnx.split(module)
        module.train()
        train_graph, _ = nnx.split(module)
    leaves: dict[Any, Any] = dict(nnx.to_flat_state(abstract))
    kinds = {path: _kind(leaf) for path, leaf in leaves.items()}
    takes_rngs = _accepts(module, "rngs")

    def paths(kind: str) -> list[Path]:
        return [path for path, k in kinds.items() if k == kind]

    def merge(graph: Any, params: Tree, model_state: Tree, key: jax.Array | None) -> nnx.Module:
        values = {}
        for path in paths("params"):
            values[path] = _get(params, path)
        for path in paths("model_state"):
            values[path] = _get(model_state, path)
        for number, path in enumerate(paths("rngs")):
            values[path] = _random_state(leaves[path], key, number)
        with nnx.use_eager_sharding(False):
            filled = [(path, _fill(leaf, values[path])) for path, leaf in leaves.items()]
            return nnx.merge(graph, nnx.from_flat_state(filled))

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        flat = dict(nnx.to_flat_state(nnx.state(build(key))))
        return (
            _nest({path: _value(flat[path]) for path in paths("params")}),
            _nest({path: _value(flat[path]) for path in paths("model_state")}),
        )

    def apply(
        params: Tree,
        model_state: Tree,
        *args: Any,
        train: bool,
        key: jax.Array | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Tree]:
        if train and key is None and paths("rngs"):
            raise ValueError(
                "this module stores random streams of its own (for dropout, say): "
                "pass key= to apply when train=True"
            )
        call_key, stored_key = (None, None) if key is None else jax.random.split(key)
        model = merge(train_graph if train else eval_graph, params, model_state, stored_key)
        if takes_rngs and call_key is not None:
            kwargs["rngs"] = nnx.Rngs(call_key)
        output = model(*args, **kwargs)
        flat = dict(nnx.to_flat_state(nnx.state(model)))
        new_state = _nest({path: _value(flat[path]) for path in paths("model_state")})
        return (Output(output) if isinstance(output, jax.Array) else output), new_state

    def bind(params: Tree, model_state: Tree) -> nnx.Module:
        return merge(eval_graph, params, model_state, None)

    shapes = {path: _abstract(_value(leaf)) for path, leaf in leaves.items()}
    return FunctionalModel(
        init=init,
        apply=apply,
        bind=bind,
        axes=_nest(
            {p: logical.of_variable(leaves[p], len(shapes[p].shape)) for p in paths("params")}
        ),
        params=_nest({path: shapes[path] for path in paths("params")}),
        model_state=_nest({path: shapes[path] for path in paths("model_state")}),
    )


def parameter_count(tree: Tree) -> int:
    """Returns how many numbers the arrays (or ``ShapeDtypeStruct``s) of a tree hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _kind(leaf: Any) -> str:
    if isinstance(leaf, nnx.RngState):
        return "rngs"
    return "params" if isinstance(leaf, nnx.Param) else "model_state"


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _fill(leaf: Any, value: Any) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _abstract(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _random_state(leaf: nnx.RngState, key: jax.Array | None, number: int) -> jax.Array:
    """Returns a stream's key, derived from ``key`` and the stream's number, or its zero count."""
    shape = leaf.get_value().shape
    if isinstance(leaf, nnx.RngKey):
        own = jax.random.fold_in(jax.random.key(0) if key is None else key, number)
        return jax.random.split(own, shape) if shape else own
    return jnp.zeros(shape, leaf.get_value().dtype)


def _accepts(module: nnx.Module, name: str) -> bool:
    """Whether a call of the module takes the keyword ``name``."""
    parameters = inspect.signature(type(module).__call__).parameters.values()
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _get(tree: Tree, path: Path) -> Any:
    for part in path:
        tree = tree[str(part)]
    return tree


def _nest(flat: dict[Path, Any]) -> Tree:
    """Builds nested dicts with string keys; lists stay in the order of their indices."""
    tree: Tree = {}
    for path, leaf in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = leaf
    return tree
