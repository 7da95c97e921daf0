"""The state of training: one pytree that holds all that a step reads and changes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Name to (weighted sum, weight), both float32 scalars."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and changes; what is not in it is not state.

    With several seeds, every array has a leading seed axis.

    Attributes:
        step: int32 []: steps done.
        seed: uint32 []: the seed's value, from which all keys are derived.
        params: what is trained, float32 (the adapters, where there are any).
        frozen: parameters that are not trained.
        model_state: what the model keeps besides, such as batch statistics.
        optimizer_state: the optimizer's.
        ema: state of the average of `params` (moving or another one), or empty.
        loss_scale: of float16 training, or empty.
        metrics: sums since the last record.
        nonfinite_step: int32 []: the first step whose loss was not finite, or -1.
        learner: of incremental learning, or empty.
        islands: what each island has of its own, along a leading axis, or empty without islands.
        hyper: config key to the value of a hyper-parameter that is data here, [] each; empty where
            all of them are constants of the program.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    frozen: Any
    model_state: Any
    optimizer_state: Any
    ema: Any
    loss_scale: Any
    metrics: Metrics
    nonfinite_step: jax.Array
    learner: dict[str, Any] = dataclasses.field(default_factory=dict)
    islands: dict[str, Any] = dataclasses.field(default_factory=dict)
    hyper: dict[str, Any] = dataclasses.field(default_factory=dict)


def init_key(seed: jax.Array) -> jax.Array:
    """Returns the key for parameter initialisation."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def step_keys(seed: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the keys of one step: for augmentations, and for the model (dropout)."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)
    augmentation, model = jax.random.split(key)
    return augmentation, model


def add_metrics(total: Metrics, new: Metrics) -> Metrics:
    """Returns the sums of both; names only in `total` stay as they are."""
    return {
        name: (sums + new[name][0], weights + new[name][1]) if name in new else (sums, weights)
        for name, (sums, weights) in total.items()
    }


def zero_metrics(abstract: Any) -> Metrics:
    """Returns empty sums for metrics like the `abstract` ones."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), abstract)
