"""The learning-rate range test: training at a rate that grows with each step, and what it tells.

The growing run shows from which rate the loss falls, and where it blows up. That point alone would
overestimate the largest stable rate: on its way there the run has damped exactly those directions
that become unstable first. So short runs at constant rates, from the first parameters, find it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lamina.platform.errors import UserError
from lamina.platform.optimizers import table

Step = Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]
"""`(state, learning rate, number of the step)` to (state, loss before the step, any shape)."""

BLOWN_UP = 4.0
"""A loss above this many times the best ends the test (Smith's practice, and fastai's); a negative
loss that rises by as much."""

PROBES = 16
"""Constant rates in one round of the search for the limit; a second round lies between two."""

UNSTABLE = 1.5
"""A short run is unstable if it ends at more than this many times the loss that it began with."""


class Found(NamedTuple):
    """What a range test found.

    Attributes:
        rates: [N] learning rates.
        losses: [N] the loss before each step.
        smoothed: [N] the same, smoothed; NaN from where it blew up.
        suggestion: the rate at which the smoothed loss falls most steeply.
        limit: the largest rate at which training is stable, or None if none up to the highest
            is unstable.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float
    limit: float | None


def growing_rates(low: float, high: float, steps: int) -> np.ndarray:
    """Returns `low (high / low)^(i / (steps - 1))`, float32 [steps].

    Raises:
        UserError: the numbers make no range.
    """
    if not 0 < low < high < np.inf:
        raise UserError(f"a range test needs 0 < low < high, not low = {low} and high = {high}")
    if steps < 20:
        raise UserError(f"a range test of {steps} steps is too short: use 100 or more")
    return np.geomspace(low, high, steps).astype(np.float32)


def grow(step: Step, state: Any, rates: jax.Array) -> jax.Array:
    """Returns the loss before each step of a run whose rate grows; one scan, to be jitted."""

    def body(state, rate_and_number):
        return step(state, *rate_and_number)

    return jax.lax.scan(body, state, (rates, jnp.arange(len(rates))))[1]


def probe(step: Step, state: Any, rates: jax.Array, steps: int) -> jax.Array:
    """Returns the losses [len(rates), steps, ...] of a short run at each rate, from one state."""

    def run(rate):
        return grow(step, state, jnp.full((steps,), rate))

    return jax.lax.map(run, rates)


def smooth(losses: np.ndarray, smoothing: float) -> tuple[np.ndarray, int]:
    """Returns the losses without noise, and how many there are before they blow up.

    They are averaged exponentially, forwards and then backwards, so that the curve isn't shifted
    to higher rates; both averages are corrected for their start.

    Args:
        losses: [N].
        smoothing: decay of the averages.
    """
    best, end = np.inf, len(losses)
    for i, loss in enumerate(losses):
        if not np.isfinite(loss) or (i > 0 and _risen(loss, best, losses[0]) > BLOWN_UP - 1):
            end = i
            break
        best = min(best, loss)
    smoothed = np.full(len(losses), np.nan)
    smoothed[:end] = _average(_average(losses[:end], smoothing)[::-1], smoothing)[::-1]
    return smoothed, end


def _risen(loss: float, before: float, first: float) -> float:
    """Returns by how much a loss is above an earlier one, as a share of that.

    Where that is negative or 0 it is a share of its size, or of the first loss's if that is larger.
    """
    size = before if before > 0 else max(abs(before), abs(first))
    if not size:
        return math.inf if loss > before else 0.0
    return (loss - before) / size


def _average(values: np.ndarray, decay: float) -> np.ndarray:
    total, weight, averages = 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        averages[i] = total / weight
    return averages


def suggest(rates: np.ndarray, smoothed: np.ndarray, end: int) -> float:
    """Returns the rate where the smoothed loss falls most steeply, per factor of the rate.

    The first ten and the last five rates before the blow-up don't count, if enough are left.

    Raises:
        UserError: the loss blows up at the lowest rate.
    """
    if end < 3:
        raise UserError(f"the loss blows up at the lowest rate, {rates[0]:g}: lower it")
    first, last = (10, end - 5) if end > 20 else (1, end)
    slopes = np.gradient(smoothed[:end], np.log(rates[:end]))
    return float(rates[first + int(np.argmin(slopes[first:last]))])


def search_limit(
    losses_at: Callable[[np.ndarray], np.ndarray], low: float, high: float
) -> float | None:
    """Returns the largest rate at which short runs are stable, or None if all are.

    Args:
        losses_at: rates [PROBES] to the losses [PROBES, steps, ...] of short runs; it is called
            twice, the second time for rates between a stable and an unstable one.
        low: lowest rate.
        high: highest rate.
    """
    for _ in range(2):
        rates = np.geomspace(low, high, PROBES)
        unstable = _unstable(losses_at(rates.astype(np.float32)))
        if not unstable.any():
            return None
        first = int(np.argmax(unstable))
        if first == 0:
            return low
        low, high = float(rates[first - 1]), float(rates[first])
    return math.sqrt(low * high)


def _unstable(losses: np.ndarray) -> np.ndarray:
    """Returns for each rate whether any of its runs ends above the loss that it began with."""
    losses = losses.reshape(*losses.shape[:2], -1)
    tail = losses[:, -max(losses.shape[1] // 4, 1) :].mean(axis=1)
    first = losses[:, 0]
    return np.any(~np.isfinite(tail) | (tail - first > (UNSTABLE - 1) * np.abs(first)), axis=-1)


def find(
    loss: Callable[[Any], jax.Array],
    params: Any,
    optimizer: str = "sgd",
    *,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 200,
    smoothing: float = 0.9,
    probe_steps: int = 30,
    **keys: Any,
) -> Found:
    """Finds learning rates for a function of parameters.

    Args:
        loss: the function; `params` are not changed.
        params: where it begins.
        optimizer: a name in the table of optimizers.
        low: lowest rate.
        high: highest rate.
        steps: of the growing run.
        smoothing: decay of the average of the losses.
        probe_steps: of each short run; 0 takes the blow-up of the growing run for the limit.
        **keys: the optimizer's.

    Raises:
        UserError: unknown names, or a range that is none.

    >>> found = find(lambda x: jnp.sum(jnp.array([5.0, 1.0]) * x**2) / 2, jnp.ones(2))
    >>> bool(0.32 < found.limit < 0.48)  # 2 / 5
    True
    """

    def step(carry, rate, number):
        del number
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        made = table.create(optimizer, rate, **keys)
        updates, state = made.update(
            grads, state, params, value=value, grad=grads, value_fn=loss, metrics={}
        )
        return (optax.apply_updates(params, updates), state), value

    rates = growing_rates(low, high, steps)
    state = jax.jit(lambda p: (p, table.create(optimizer, low, **keys).init(p)))(params)
    losses = np.asarray(jax.jit(lambda s: grow(step, s, jnp.asarray(rates)))(state))
    found = conclude(rates, losses, smoothing)
    if not probe_steps:
        return found
    probing = jax.jit(lambda s, r: probe(step, s, r, probe_steps))
    limit = search_limit(lambda r: np.asarray(probing(state, r)), low, high)
    return found._replace(limit=limit)


def conclude(rates: np.ndarray, losses: np.ndarray, smoothing: float) -> Found:
    """Returns what the losses of a growing run tell; its limit is where that run blew up.

    Args:
        rates: [N].
        losses: [N].
        smoothing: decay of the average.

    Raises:
        UserError: it blew up at once.
    """
    smoothed, end = smooth(losses, smoothing)
    limit = float(rates[end]) if end < len(rates) else None
    return Found(rates, losses, smoothed, suggest(rates, smoothed, end), limit)
