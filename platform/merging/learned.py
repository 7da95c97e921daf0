"""Learned merges: coefficients trained by gradients through the merged weights.

One engine, `learn`: what differs between methods is how coefficients become parameters, and the
loss. Letters: T models, S steps.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lamina.platform.checkpoints import names
from lamina.platform.merging import mergers
from lamina.platform.merging.mergers import Merger
from lamina.platform.merging.method import Method

Tree = Any
Loss = Callable[[Tree, Any, Any], jax.Array]
"""(parameters, batch, what is held for all steps) to a scalar."""


NEEDS = {"entropy": "unlabeled", "labels": "labeled"}
"""What `Merger.needs` says of an objective."""


class Learned(NamedTuple):
    """What a learned merge gives.

    Attributes:
        params: the merged parameters.
        coefficients: with which they were merged.
        losses: float32 [S], before each step.
    """

    params: Tree
    coefficients: Tree
    losses: jax.Array


def learn(
    merge: Callable[[Tree], Tree],
    coefficients: Tree,
    loss: Loss,
    batches: Any,
    held: Any,
    optimizer: optax.GradientTransformation,
    project: Callable[[Tree], Tree] = lambda coefficients: coefficients,
) -> Learned:
    """Minimises `loss(merge(coefficients), batch, held)` over the coefficients, in one scan.

    Pure, to be jitted; only the coefficients are differentiated.

    Args:
        merge: coefficients to parameters, differentiable.
        coefficients: where to start.
        loss: what to minimise.
        batches: arrays with S first: a batch for each step.
        held: what every step sees, such as the heads of the tasks.
        optimizer: of the coefficients.
        project: what is done to them after each step, such as clipping.
    """

    def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        coefficients, state = carry
        of = lambda c: loss(merge(c), batch, held)
        value, slopes = jax.value_and_grad(of)(coefficients)
        updates, state = optimizer.update(slopes, state, coefficients)
        return (project(optax.apply_updates(coefficients, updates)), state), value

    start = (coefficients, optimizer.init(coefficients))
    (coefficients, _), losses = jax.lax.scan(step, start, batches)
    return Learned(merge(coefficients), coefficients, losses)


def entropy(logits: jax.Array) -> jax.Array:
    """Returns the entropy in nats of the softmax over the last axis: float32 [...]."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def merger(
    coefficients: Literal["task", "layer"],
    objective: Literal["entropy", "labels"],
    start: float,
    learning_rate: float,
    b1: float,
    b2: float,
    clip: bool,
) -> Merger:
    """Returns AdaMerging's merger; see `with_data.adamerging`."""
    plain = Method(None, base=True)
    optimizer = optax.adam(learning_rate, b1=b1, b2=b2)
    project = lambda c: jax.tree.map(lambda x: jnp.clip(x, 0, 1), c) if clip else c

    @functools.partial(jax.jit, static_argnames=("axes", "loss"))
    def run(models, base, weights, batches, held, axes, loss) -> Learned:
        leaves = mergers.fit(models, base, names.nest(dict(axes)) if axes else None)
        combine = functools.partial(_combine, leaves, leaves.models, leaves.base, weights)
        first = _start(leaves, coefficients, start, len(models))
        merge = lambda c: leaves.rebuild(combine(c))
        return learn(merge, first, loss, batches, held, optimizer, project)

    def fit(
        models: Sequence[Tree],
        *,
        base: Tree,
        weights: Any = None,
        axes: Tree = None,
        loss: Loss | None = None,
        batches: Any = None,
        held: Any = None,
    ) -> Learned:
        models = list(models)
        if base is None:
            raise ValueError("needs a base: the parameters that the models were fine-tuned from")
        if loss is None or batches is None:
            raise ValueError(
                "needs loss= and batches=: what to minimise, and a batch for each step"
            )
        leaves = mergers.fit(models, base, axes)
        weights = jnp.asarray(plain.weights(len(models), weights), jnp.result_type(float))
        known = None if axes is None else tuple(zip(leaves.names, leaves.axes, strict=True))
        return run(models, base, weights, batches, held, known, loss)

    def apply(models: Sequence[Tree], **given: Any) -> Tree:
        return fit(models, **given).params

    return Merger("adamerging", apply, True, False, needs=NEEDS[objective], fit=fit)


def _start(leaves: mergers.Leaves, kind: str, start: float, count: int) -> dict[str, jax.Array]:
    """The first coefficients: [T] for all, or for each tensor [T] or [T, layers]."""
    if kind == "task":
        return {"all": jnp.full(count, start)}
    found = {}
    for n, name in enumerate(leaves.names):
        if leaves.floating(n):
            axes = leaves.axes[n]
            stacked = bool(axes) and axes[0] == "layers"
            layers = leaves.models[n][0].shape[:1] if stacked else ()
            found[name] = jnp.full((count, *layers), start)
    return found


def _combine(
    leaves: mergers.Leaves, models: Any, bases: Any, weights: jax.Array, coefficients: Any
) -> list[jax.Array]:
    """Returns `B + sum_t w_t c_t D_t`, leaf by leaf."""
    merged = []
    for n, name in enumerate(leaves.names):
        base = bases[n]
        if not leaves.floating(n):
            merged.append(base)
            continue
        own = coefficients["all"] if "all" in coefficients else coefficients[name]
        dtype = mergers.work_dtype([*models[n], base])
        wide, total = base.astype(dtype), base.astype(dtype)
        for t, model in enumerate(models[n]):
            factor = own[t].astype(dtype) * weights[t].astype(dtype)
            factor = factor.reshape(factor.shape + (1,) * (wide.ndim - factor.ndim))
            total = total + factor * (model.astype(dtype) - wide)
        merged.append(total.astype(base.dtype))
    return merged
