"""Schedule-free learning: an average of the iterates takes the place of a decaying schedule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ScheduleFreeState(NamedTuple):
    """State of the schedule-free optimizers; the trained parameters are y.

    Attributes:
        step: int32 []: updates done.
        b1: float32 []: the share of the average in y.
        weight_sum: float32 []: sum of the iterates' weights.
        largest_rate: float32 []: the largest learning rate so far.
        z: the iterates.
        base: state of the direction.
    """

    step: jax.Array
    b1: jax.Array
    weight_sum: jax.Array
    largest_rate: jax.Array
    z: Any
    base: optax.OptState


def average(b1: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """Returns the weights to evaluate, `x = (y - (1 - b1) z) / b1`.

    Args:
        b1: the share of the average in y.
        y: a trained parameter.
        z: its iterate.
    """
    return ((y - (1 - b1) * z) / b1).astype(y.dtype)


def schedule_free(
    base: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> optax.GradientTransformation:
    """Returns the schedule-free form of a method without momentum; see `schedule_free_sgd`.

    Args:
        base: gives the direction d.
        learning_rate: the step size.
        b1: as in `schedule_free_sgd`, and so are the others.
        warmup_steps: W.
        r: power of the step.
        weight_lr_power: power of the learning rate.

    Raises:
        ValueError: `b1` is 0, from which the average can't be found again.
    """
    if isinstance(b1, int | float) and not 0 < b1 < 1:
        raise ValueError(f"b1 = {b1} should lie in (0, 1): it is the share of the average")

    def init(params):
        return ScheduleFreeState(
            step=jnp.zeros((), jnp.int32),
            b1=jnp.asarray(b1, float),
            weight_sum=jnp.zeros(()),
            largest_rate=jnp.zeros(()),
            z=jax.tree.map(jnp.copy, params),
            base=base.init(params),
        )

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("this optimizer needs the parameters: update(updates, state, params)")
        count = state.step + 1
        peak = learning_rate(state.step) if callable(learning_rate) else learning_rate
        rate = peak * jnp.minimum(count / jnp.maximum(warmup_steps, 1.0), 1.0)
        largest = jnp.maximum(state.largest_rate, rate).astype(state.largest_rate.dtype)
        weight = count**r * largest**weight_lr_power
        total = (state.weight_sum + weight).astype(state.weight_sum.dtype)
        share = jnp.where(total > 0, weight / total, 0.0)
        direction, base_state = base.update(updates, state.base, params)

        def moved(y, z, d):
            return (share * (z - y) + rate * (b1 * (1 - share) - 1) * d).astype(y.dtype)

        steps = jax.tree.map(moved, params, state.z, direction)
        z = jax.tree.map(lambda z, d: (z - rate * d).astype(z.dtype), state.z, direction)
        return steps, ScheduleFreeState(count, state.b1, total, largest, z, base_state)

    return optax.GradientTransformation(init, update)


def schedule_free_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> optax.GradientTransformation:
    """Schedule-free SGD: the average of the iterates takes the place of a decaying schedule.

    With z and x the iterates and their average, gradients are taken (and parameters trained) at
    `y = (1 - b1) z + b1 x`. At step t = 1, 2, ..., with the warmed-up rate `a_t = a min(t / W, 1)`:
    `z <- z - a_t (g(y) + wd y)`, `x <- (1 - c) x + c z`,
    `c = w_t / (w_1 + ... + w_t)`, `w_t = t^r (max_{s <= t} a_s)^weight_lr_power`.

    Use it with the schedule "constant". Evaluate the weights x, which
    `lamina.platform.optimizers.eval_params` returns; the train program does.
    optax.contrib.schedule_free starts its warm-up at a rate of 0, and has no `r`; the paper's
    starts at a / W, as this does and as the schedule "constant" with its own warm-up does.

    Args:
        learning_rate: the step size.
        b1: where gradients are taken, between the iterate (0) and the average (1), in (0, 1)
            (default: the paper's, as all below; 0.98 for long runs of AdamW).
        weight_decay: times the learning rate, applied where the gradient is taken.
        warmup_steps: W; 0 for none, also when the schedule warms up.
        r: power of the step in an iterate's weight; 0 gives early and late ones the same.
        weight_lr_power: power of the learning rate in an iterate's weight.

    Raises:
        ValueError: `b1` is not in (0, 1).

    References:
        Defazio et al., The Road Less Scheduled, https://arxiv.org/abs/2405.15682
    """
    base = optax.add_decayed_weights(weight_decay)
    return schedule_free(base, learning_rate, b1, warmup_steps, r, weight_lr_power)


def schedule_free_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> optax.GradientTransformation:
    """Schedule-free AdamW: `schedule_free_sgd` on gradients divided by Adam's denominator.

    `d = g / (sqrt(v / (1 - b2^t)) + eps) + wd y` in the place of the gradient.

    Args:
        learning_rate: the step size.
        b1: as in `schedule_free_sgd`.
        b2: decay of the average of the squared gradients (default: the paper's).
        eps: added to the denominator.
        weight_decay: times the learning rate, applied where the gradient is taken.
        warmup_steps: as in `schedule_free_sgd`.
        r: as in `schedule_free_sgd`.
        weight_lr_power: as in `schedule_free_sgd`.

    Raises:
        ValueError: `b1` is not in (0, 1).

    References:
        Defazio et al., The Road Less Scheduled, https://arxiv.org/abs/2405.15682
    """
    base = optax.chain(
        optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay),
    )
    return schedule_free(base, learning_rate, b1, warmup_steps, r, weight_lr_power)
