"""A learning rate that falls when the loss no longer does: a schedule with a state of its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lamina.platform.optimizers.ramps import Schedule, check, warmup


class Controlled(NamedTuple):
    """A schedule whose factor also depends on what was measured.

    Attributes:
        schedule: step to the part of the factor that depends on the step only.
        controller: scales the updates by the rest; it is the last of the optimizer's chain, and its
            state is saved with the optimizer's.
    """

    schedule: Schedule
    controller: optax.GradientTransformationExtraArgs


class PlateauState(NamedTuple):
    """State of `reduce_on_plateau`.

    Attributes:
        factor: float32 []: of the learning rate.
        best: float32 []: the lowest mean loss of a window so far.
        waited: int32 []: windows since it was reached, or since the factor last fell.
        total: float32 []: sum of the losses in this window.
        steps: int32 []: steps in this window.
    """

    factor: jax.Array
    best: jax.Array
    waited: jax.Array
    total: jax.Array
    steps: jax.Array


def reduce_on_plateau(
    factor: float, patience: int, every: int, tolerance: float, min_factor: float
) -> optax.GradientTransformationExtraArgs:
    """Returns the controller of `plateau`; its `update` needs `value`, the loss of the step."""

    def init(params):
        del params
        return PlateauState(
            factor=jnp.ones((), jnp.float32),
            best=jnp.full((), jnp.inf, jnp.float32),
            waited=jnp.zeros((), jnp.int32),
            total=jnp.zeros((), jnp.float32),
            steps=jnp.zeros((), jnp.int32),
        )

    def update(updates, state, params=None, *, value=None, **unused):
        del params, unused
        if value is None:
            raise ValueError("the schedule 'plateau' needs the loss: update(..., value=loss)")
        total, steps = state.total + jnp.asarray(value, jnp.float32), state.steps + 1
        due = steps >= every
        mean = total / steps
        first = jnp.isinf(state.best)
        better = jnp.where(first, True, mean < state.best - tolerance * jnp.abs(state.best))
        waited = jnp.where(better, 0, state.waited + 1)
        falls = waited >= patience
        reduced = jnp.maximum(state.factor * factor, jnp.minimum(min_factor, state.factor))
        window = PlateauState(
            factor=jnp.where(falls, reduced, state.factor).astype(jnp.float32),
            best=jnp.where(better & jnp.isfinite(mean), mean, state.best),
            waited=jnp.where(falls, 0, waited),
            total=jnp.zeros_like(total),
            steps=jnp.zeros_like(steps),
        )
        inside = state._replace(total=total, steps=steps)
        new = jax.tree.map(lambda a, b: jnp.where(due, a, b), window, inside)
        scaled = jax.tree.map(lambda u: (new.factor * u).astype(u.dtype), updates)
        return scaled, new

    return optax.GradientTransformationExtraArgs(init, update)


def plateau(
    steps: int,
    *,
    factor: float = 0.1,
    patience: int = 10,
    every: int = 100,
    tolerance: float = 1e-4,
    min_factor: float = 0.0,
    warmup_steps: int = 0,
) -> Controlled:
    """The peak, multiplied by `factor` whenever the training loss has ceased to fall.

    The loss is averaged over windows of `every` steps. Where `patience` windows in a row are not
    better than the best by the share `tolerance`, the factor falls, and the count starts again.
    The state is part of the optimizer's, so that a run resumes exactly. The updates are scaled,
    which is the same as another learning rate but for methods whose step isn't proportional to it
    (`rprop`, `core`) or that average by it (schedule-free ones).

    Args:
        steps: of the run; unused.
        factor: in (0, 1) (default: PyTorch's ReduceLROnPlateau, as the next but one).
        patience: windows without an improvement.
        every: steps in a window.
        tolerance: share of the best by which a better one is lower (default: PyTorch's).
        min_factor: lower bound.
        warmup_steps: W.
    """
    del steps
    check((factor > 0) & (factor < 1), f"factor = {factor} should be in (0, 1)")
    check(patience >= 1, f"patience = {patience} should be 1 or more")
    check(every >= 1, f"every = {every} should be 1 or more")
    check(tolerance >= 0, f"tolerance = {tolerance} should be 0 or more")
    check(warmup_steps >= 0, f"warmup_steps = {warmup_steps} should be 0 or more")
    check((min_factor >= 0) & (min_factor <= 1), f"min_factor = {min_factor} should be in [0, 1]")
    return Controlled(
        lambda step: warmup(step, warmup_steps),
        reduce_on_plateau(factor, patience, every, tolerance, min_factor),
    )


def current_factor(optimizer_state: Any) -> jax.Array | float:
    """Returns the factor by which plateaus have lowered the learning rate; 1 without any."""
    is_plateau = lambda node: isinstance(node, PlateauState)
    leaves = jax.tree.leaves(optimizer_state, is_leaf=is_plateau)
    factors = [node.factor for node in leaves if is_plateau(node)]
    return factors[0] if factors else 1.0
