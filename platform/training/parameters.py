"""Which parameters are trained: all, those that aren't frozen, or low-rank adapters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from lamina.models import lora
from lamina.platform.checkpoints import transfer


class Parameters(NamedTuple):
    """How a model's parameters fall into trained and frozen ones.

    Attributes:
        partition: `(key, params) -> (trained, frozen)`.
        combine: `(trained, frozen) -> params`, as the model takes them.
        axes: trained parameters to their logical axes, or to those that are known.
    """

    partition: Callable[[jax.Array, Any], tuple[Any, Any]]
    combine: Callable[[Any, Any], Any]
    axes: Callable[[Any], Any]


def create(
    freeze: Sequence[str],
    rank: int,
    alpha: float,
    paths: Sequence[str],
    abstract: Any,
    axes: Any,
) -> Parameters:
    """Returns how the parameters are trained.

    Args:
        freeze: regular expressions of parameter paths that aren't trained.
        rank: rank of the adapters; 0 trains the parameters themselves.
        alpha: scale of the adapters, divided by the rank.
        paths: regular expressions of the paths that get an adapter.
        abstract: the model's parameters, as `jax.ShapeDtypeStruct`s.
        axes: their logical axes.

    Raises:
        ValueError: an expression is invalid or matches nothing, or nothing is left to train.
    """
    if rank:
        if freeze:
            raise ValueError("adapters freeze all parameters: remove init_from_rules.freeze")
        return Parameters(
            partition=lambda key, params: (
                lora.init(key, params, rank=rank, paths=tuple(paths), axes=axes),
                params,
            ),
            combine=lambda trained, frozen: lora.apply(frozen, trained, rank=rank, alpha=alpha),
            axes=lambda trained: lora.adapter_axes(trained, axes),
        )
    if not freeze:
        return Parameters(
            lambda key, params: (params, {}), lambda trained, frozen: trained, lambda trained: axes
        )
    names = list(flat(abstract))
    frozen_names = transfer.select(names, freeze, "init_from_rules.freeze")
    if len(frozen_names) == len(names):
        raise ValueError(f"init_from_rules.freeze = {tuple(freeze)} leaves nothing to train")

    def partition(key, params):
        leaves = flat(params)
        trained = {name: leaf for name, leaf in leaves.items() if name not in frozen_names}
        frozen = {name: leaf for name, leaf in leaves.items() if name in frozen_names}
        return nested(trained), nested(frozen)

    return Parameters(
        partition,
        lambda trained, frozen: nested(flat(trained) | flat(frozen)),
        lambda trained: axes,
    )


def replace(params: Any, loaded: Mapping[str, jax.Array]) -> Any:
    """Returns `params` with the values of `loaded` at their paths."""
    return nested({name: loaded.get(name, leaf) for name, leaf in flat(params).items()})


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `a/b/c` to leaf."""
    return traverse_util.flatten_dict(tree, sep="/")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict that `flat` came from."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")
