"""How a batch is split: between devices, islands and the parts of an accumulation."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from lamina.platform.errors import UserError
from lamina.platform.optimizers import rules, weights
from lamina.platform.optimizers.islands.method import Exchange, Method, Rounds
from lamina.platform.training.state import TrainState
from lamina.sharding import mesh as meshes
from lamina.sharding import rules as partition_rules

_REPEATED = 16
"""How often a batch may hold an example: repeated augmentation takes one a few times, and a large
batch is timed with few synthetic examples."""


def check_size(block: Mapping[str, Any], examples: int) -> None:
    """Raises a `UserError` where a batch would hold the data many times over.

    Args:
        block: the config's `data`.
        examples: in the training split; 0: there is none.
    """
    size = block.get("batch_size", 0)
    if examples and size > _REPEATED * examples:
        raise UserError(
            f"data.batch_size = {size}, but there are {examples} training examples: a batch would "
            f"hold each of them {size / examples:.0f} times; use at most {examples}"
        )


def check_batch(c: FrozenConfigDict, mesh: Mesh, method: Method | None) -> None:
    """Raises a `UserError` where mesh, islands and accumulation don't divide the batch."""
    size, number = c.data.batch_size, method.number if method else 1
    if number % mesh.shape["replica"] and method:
        raise UserError(
            f"mesh.replica = {mesh.shape['replica']} doesn't divide the {number} islands: use "
            f"mesh.replica = {number}, a divisor of it, or islands.number = "
            f"{mesh.shape['replica']}"
        )
    if size % number:
        raise UserError(
            f"data.batch_size = {size} doesn't divide by islands.number = {number}: each island "
            f"has an equal part of every batch; use {size - size % number or number}"
        )
    parts = meshes.batch_parallelism(mesh)
    if method:
        parts = parts // mesh.shape["replica"] * number
    if size % (parts * c.accumulation):
        split = f"the mesh ({meshes.describe(mesh)})" + (f" and {number} islands" if method else "")
        raise UserError(
            f"data.batch_size = {size} doesn't divide by {parts * c.accumulation}: {split} "
            f"{'split' if method else 'splits'} a batch in {parts}, accumulation in "
            f"{c.accumulation}"
        )


def check_islands(c: FrozenConfigDict, method: Method | None, state: TrainState) -> None:
    """Raises a `UserError` where the rest of a run isn't for its islands.

    Args:
        c: resolved.
        method: of the islands.
        state: of one seed, maybe abstract.
    """
    if isinstance(method, Exchange) and c.precision == "float16":
        raise UserError(f"islands.name = {c.islands.name!r}: float16 isn't for it, use bfloat16")
    if isinstance(method, Exchange) and c.optimizer.name in rules.WHOLE:
        raise UserError(
            f"optimizer.name = {c.optimizer.name!r} evaluates the loss, of which an island of "
            f"islands.name = {c.islands.name!r} knows its part alone: take another optimizer"
        )
    own = state.islands.get("optimizer_state")
    if isinstance(method, Rounds) and any(map(weights.keeps_average, (own, state.optimizer_state))):
        raise UserError(
            "a schedule-free optimizer evaluates other weights than it trains, which islands "
            "don't average: take another optimizer, or islands.name = 'demo'"
        )


def activations(
    layout: partition_rules.Rules, mesh: Mesh, method: Method | None
) -> dict[str, tuple[str, ...]]:
    """Returns what splits activations; on an island the mesh axis of the islands doesn't."""
    found = partition_rules.of_activations(layout, mesh)
    if method is None:
        return found
    return {name: tuple(a for a in axes if a != "replica") for name, axes in found.items()}
