"""Schedules for training that goes on: an endless one, and one that starts anew for new data."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.optimizers.ramps import (
    Schedule,
    check,
    check_boundaries,
    check_factors,
    progress,
    real,
    share,
    warmup,
)


def infinite(
    steps: int,
    *,
    cooldown_steps: int,
    warmup_steps: int = 0,
    constant_factor: float = 0.55,
    anneal_steps: int = 0,
    final_factor: float = 0.1,
) -> Schedule:
    """Warm-up, half a cosine down to a constant that lasts, and an anneal only if asked for.

    Before the anneal nothing depends on the length of the run: it may be made longer, or forked for
    an anneal, at any time. The anneal over the last A steps is exponential, from c to f:
    `c (f / c)^x`.

    Args:
        steps: of the run, with everything.
        cooldown_steps: steps from the peak to the constant.
        warmup_steps: W.
        constant_factor: c (default: the paper's 1.65e-4 of 3e-4).
        anneal_steps: A; 0 for none.
        final_factor: f (default: the paper's 3e-5 of 3e-4).

    References:
        Ibrahim et al., Simple and Scalable Strategies to Continually Pre-train Large Language
        Models, https://arxiv.org/abs/2403.08763
    """
    check(warmup_steps >= 0, f"warmup_steps = {warmup_steps} should be 0 or more")
    check(cooldown_steps >= 0, f"cooldown_steps = {cooldown_steps} should be 0 or more")
    check(anneal_steps >= 0, f"anneal_steps = {anneal_steps} should be 0 or more")
    check(constant_factor > 0, f"constant_factor = {constant_factor} should be above 0")
    check(final_factor > 0, f"final_factor = {final_factor} should be above 0")
    known = anneal_steps + warmup_steps + cooldown_steps
    check(
        (anneal_steps == 0) | (known <= steps),
        f"warm-up, cool-down and anneal take {known} of {steps} steps",
    )

    def schedule(step):
        x = progress(step, warmup_steps, cooldown_steps)
        cooled = constant_factor + (1 - constant_factor) * (1 + jnp.cos(math.pi * x)) / 2
        y = progress(step, steps - anneal_steps, anneal_steps)
        return warmup(step, warmup_steps) * cooled * jnp.power(final_factor / constant_factor, y)

    return schedule


def rewarm(
    steps: int,
    *,
    boundaries: tuple[int, ...],
    warmup_fraction: float = 0.01,
    final_factor: float = 0.1,
) -> Schedule:
    """A warm-up and half a cosine for each stage of the data: re-warming and re-decaying.

    Each stage rises in a straight line from where the one before ended (the first from 0) to the
    peak, and decays to `final_factor` at its end. A stage knows only its own length.

    Args:
        steps: of the run.
        boundaries: the first steps of all stages but the first, increasing.
        warmup_fraction: share of each stage in its warm-up (default: reference 2, which finds that
            it matters little).
        final_factor: value at the end of a stage (default: both references).

    References:
        1. Gupta et al., Continual Pre-Training of Large Language Models: How to (re)warm your
           model?, https://arxiv.org/abs/2308.04014
        2. Ibrahim et al., Simple and Scalable Strategies to Continually Pre-train Large Language
           Models, https://arxiv.org/abs/2403.08763
    """
    check_boundaries(boundaries, steps)
    check_factors(final_factor=final_factor)
    points = (0, *boundaries, steps)
    check(
        (warmup_fraction >= 0) & (warmup_fraction < 1),
        f"warmup_fraction = {warmup_fraction} should be in [0, 1)",
    )
    starts = np.asarray(points[:-1], np.int32)
    lengths = np.diff(np.asarray(points, np.int32))
    rises = jnp.stack([jnp.asarray(share(warmup_fraction, int(n)), jnp.int32) for n in lengths])

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        stage = jnp.searchsorted(jnp.asarray(starts[1:]), jnp.asarray(step), side="right")
        inside = jnp.asarray(step) - jnp.asarray(starts)[stage]
        rise, length = rises[stage], jnp.asarray(lengths)[stage]
        before = jnp.where(stage == 0, 0.0, final_factor)
        rising = before + (1 - before) * (real(inside) + 1) / jnp.maximum(rise, 1)
        x = progress(inside, rise, length - rise)
        falling = final_factor + (1 - final_factor) * (1 + jnp.cos(math.pi * x)) / 2
        return jnp.where(inside < rise, rising, falling)

    return schedule
