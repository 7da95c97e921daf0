"""Averages of the parameters over the steps, to evaluate instead of the last ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Averaging(NamedTuple):
    """An average that a run keeps beside its parameters.

    Attributes:
        init: parameters to the average's state, a pytree like them.
        update: `(state, parameters, steps) -> state`, with the parameters after so many steps.
        weights: `(state, parameters, steps) -> parameters` to evaluate then; these themselves
            where nothing has been averaged yet.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, jax.Array], Any]
    weights: Callable[[Any, Any, jax.Array], Any]


def ema(decay: Any) -> Averaging:
    """Exponential moving average: `x <- x + (1 - d_t) (theta - x)` after every step t = 1, 2, ...

    `d_t = min(decay, t / (t + 9))`, so that the average forgets the parameters it started from, as
    in TensorFlow's ExponentialMovingAverage with a number of updates.

    Args:
        decay: share of the average that stays, in (0, 1); it may be traced.
    """

    def update(average: Any, params: Any, steps: jax.Array) -> Any:
        count = (steps - 1).astype(jnp.float32)
        share = jnp.minimum(decay, (1 + count) / (10 + count))
        return jax.tree.map(lambda e, p: e + (1 - share) * (p - e), average, params)

    return Averaging(_copies, update, lambda average, params, steps: average)


def swa(start: int, every: int) -> Averaging:
    """Stochastic weight averaging: the mean of the parameters after every k-th step since `start`.

    `x_n = x_{n-1} + (theta - x_{n-1}) / n` after the steps `start + n k`, n = 1, 2, ... What a
    model keeps besides, such as batch statistics, is that of the last step: it is not measured
    again for the average.

    Args:
        start: step from which on parameters are averaged.
        every: k, at least 1.

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization,
        https://arxiv.org/abs/1803.05407
    """

    def update(average: Any, params: Any, steps: jax.Array) -> Any:
        number = (steps - start) // every
        due = (number > 0) & ((steps - start) % every == 0)
        count = jnp.maximum(number, 1)
        add = lambda x, p: jnp.where(due, x + (p - x) / count.astype(x.dtype), x)
        return jax.tree.map(add, average, params)

    def weights(average: Any, params: Any, steps: jax.Array) -> Any:
        any_yet = steps - start >= every
        return jax.tree.map(lambda x, p: jnp.where(any_yet, x, p), average, params)

    return Averaging(_copies, update, weights)


def lawa(latest: int, every: int) -> Averaging:
    """Latest weight averaging: the mean of the last k of the parameters after every n-th step.

    All k are kept, in the state of the run.

    Args:
        latest: k, at least 1.
        every: n, at least 1; in the paper an epoch.

    References:
        Kaddour 2022, Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest
        Weight Averaging, https://arxiv.org/abs/2209.14981
    """

    def init(params: Any) -> Any:
        return jax.tree.map(lambda p: jnp.broadcast_to(p, (latest, *p.shape)), params)

    def update(ring: Any, params: Any, steps: jax.Array) -> Any:
        due = steps % every == 0
        slot = (steps // every - 1) % latest
        put = lambda r, p: r.at[slot].set(jnp.where(due, p, r[slot]))
        return jax.tree.map(put, ring, params)

    def weights(ring: Any, params: Any, steps: jax.Array) -> Any:
        number = jnp.minimum(steps // every, latest)
        share = (jnp.arange(latest) < number) / jnp.maximum(number, 1)

        def mean(r: jax.Array, p: jax.Array) -> jax.Array:
            total = jnp.tensordot(share.astype(r.dtype), r, axes=1)
            return jnp.where(number > 0, total, p)

        return jax.tree.map(mean, ring, params)

    return Averaging(init, update, weights)


def _copies(params: Any) -> Any:
    return jax.tree.map(jnp.copy, params)
