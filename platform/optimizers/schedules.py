"""Learning-rate schedules: the factor of the peak learning rate, as a function of the step.

A factory takes the number of steps of the run and its config keys, and returns a function from a
step (0, 1, ...; an integer or an integer array) to a float32 factor. The conventions of all:

- Warm-up over W steps: the factor at step s < W is (s + 1) / W, so that the first step has a factor
  above 0 and step W - 1 has the peak. The rest starts from the peak at step W.
- A decay over n steps from step a has the progress x = (s - a) / n at step s: its end value would
  be reached at step a + n, the first one after the run, so that no step is spent at factor 0.
- From step `steps` on, the last value is kept.

Steps are exact up to 2^24 (float32). Numbers among the keys may be traced scalars, so that a sweep
can vectorise over them; `steps` is a plain integer.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from lamina.platform.optimizers.plateau import plateau
from lamina.platform.optimizers.ramps import (
    Schedule,
    check,
    check_boundaries,
    check_factors,
    progress,
    real,
    share,
    steps_after_warmup,
    warmup,
)
from lamina.platform.optimizers.stages import infinite, rewarm


def constant(steps: int, *, warmup_steps: int = 0) -> Schedule:
    """The peak throughout, after an optional warm-up.

    Args:
        steps: of the run; unused.
        warmup_steps: W; 0 starts at the peak.
    """
    del steps
    check(warmup_steps >= 0, f"warmup_steps = {warmup_steps} should be 0 or more")
    return lambda step: warmup(step, warmup_steps)


def linear(steps: int, *, warmup_steps: int = 0, final_factor: float = 0.0) -> Schedule:
    """A straight line from the peak to `final_factor`: `1 - (1 - final_factor) x`.

    Args:
        steps: of the run, with the warm-up.
        warmup_steps: W.
        final_factor: value at the end.

    >>> linear(4)(np.arange(5)).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    check_factors(final_factor=final_factor)
    decay = steps_after_warmup(steps, warmup_steps)

    def schedule(step):
        x = progress(step, warmup_steps, decay)
        return warmup(step, warmup_steps) * (1 - (1 - final_factor) * x)

    return schedule


def cosine(steps: int, *, warmup_steps: int = 0, final_factor: float = 0.0) -> Schedule:
    """Half a cosine from the peak to f = `final_factor`: `f + (1 - f) (1 + cos(pi x)) / 2`.

    Args:
        steps: of the run, with the warm-up.
        warmup_steps: W.
        final_factor: value at the end.

    References:
        Loshchilov and Hutter, SGDR, https://arxiv.org/abs/1608.03983 (one cycle, no restart)
    """
    check_factors(final_factor=final_factor)
    decay = steps_after_warmup(steps, warmup_steps)

    def schedule(step):
        x = progress(step, warmup_steps, decay)
        factor = final_factor + (1 - final_factor) * (1 + jnp.cos(math.pi * x)) / 2
        return warmup(step, warmup_steps) * factor

    return schedule


def one_cycle(
    steps: int,
    *,
    rise_fraction: float = 0.3,
    start_factor: float = 0.04,
    final_factor: float = 4e-6,
) -> Schedule:
    """Half a cosine up to the peak, then half a cosine down to far below the start.

    It has no warm-up of its own kind: it starts at `start_factor` and reaches the peak at step
    `round(rise_fraction * steps)`.

    Args:
        steps: of the run.
        rise_fraction: share of the steps before the peak (this and the other defaults: those of
            optax.cosine_onecycle_schedule and PyTorch's OneCycleLR).
        start_factor: value at step 0.
        final_factor: value at the end.

    References:
        Smith and Topin, Super-Convergence, https://arxiv.org/abs/1708.07120
    """
    check_factors(start_factor=start_factor, final_factor=final_factor)
    check(steps >= 1, f"steps = {steps} should be 1 or more")
    check(
        (rise_fraction >= 0) & (rise_fraction < 1),
        f"rise_fraction = {rise_fraction} should be in [0, 1)",
    )
    rise = share(rise_fraction, steps)

    def schedule(step):
        up = (1 - jnp.cos(math.pi * progress(step, 0, rise))) / 2
        down = (1 + jnp.cos(math.pi * progress(step, rise, steps - rise))) / 2
        rising = start_factor + (1 - start_factor) * up
        return jnp.where(jnp.asarray(step) < rise, rising, final_factor + (1 - final_factor) * down)

    return schedule


def wsd(
    steps: int,
    *,
    warmup_steps: int = 0,
    decay_fraction: float = 0.2,
    shape: Literal["linear", "sqrt"] = "sqrt",
    final_factor: float = 0.0,
) -> Schedule:
    """Warm-up, stable, decay: the peak until the last `decay_fraction` of the run.

    The decay is `1 - (1 - f) x` ("linear") or `1 - (1 - f) sqrt(x)` ("sqrt"), f = `final_factor`.
    Runs of different lengths are the same until the shorter one starts to decay.

    Args:
        steps: of the run, with the warm-up.
        warmup_steps: W.
        decay_fraction: share of all steps in the decay (default: reference 2).
        shape: of the decay (default: reference 2, which finds it best).
        final_factor: value at the end.

    References:
        1. Hu et al., MiniCPM, https://arxiv.org/abs/2404.06395
        2. Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations,
           https://arxiv.org/abs/2405.18392
    """
    check_factors(final_factor=final_factor)
    check(
        (decay_fraction >= 0) & (decay_fraction <= 1),
        f"decay_fraction = {decay_fraction} should be in [0, 1]",
    )
    check(shape in ("linear", "sqrt"), f"shape = {shape!r} should be 'linear' or 'sqrt'")
    decay = share(decay_fraction, steps)
    stable = steps_after_warmup(steps, warmup_steps) - decay
    check(stable >= 0, f"warmup_steps = {warmup_steps} and a decay of {decay} exceed {steps} steps")

    def schedule(step):
        x = progress(step, steps - decay, decay)
        x = jnp.sqrt(x) if shape == "sqrt" else x
        return warmup(step, warmup_steps) * (1 - (1 - final_factor) * x)

    return schedule


def inverse_square_root(steps: int, *, warmup_steps: int) -> Schedule:
    """Linear warm-up to the peak, then `sqrt(W / (s + 1))`.

    Args:
        steps: of the run; unused.
        warmup_steps: W, also the time scale of the decay; 1 or more (the paper: 4000).

    References:
        Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762, section 5.3
    """
    del steps
    check(warmup_steps >= 1, f"warmup_steps = {warmup_steps} should be 1 or more")

    def schedule(step):
        count = jnp.maximum(real(step) + 1, warmup_steps)
        return warmup(step, warmup_steps) * jnp.sqrt(warmup_steps / count)

    return schedule


def exponential(steps: int, *, rate: float, every: int = 1, warmup_steps: int = 0) -> Schedule:
    """`rate^((s - W) / every)` after the warm-up.

    Args:
        steps: of the run; unused.
        rate: factor by which it falls every `every` steps, in (0, 1].
        every: number of steps.
        warmup_steps: W.
    """
    del steps
    check((rate > 0) & (rate <= 1), f"rate = {rate} should be in (0, 1]")
    check(every >= 1, f"every = {every} should be 1 or more")
    check(warmup_steps >= 0, f"warmup_steps = {warmup_steps} should be 0 or more")

    def schedule(step):
        passed = jnp.maximum(real(step) - warmup_steps, 0)
        return warmup(step, warmup_steps) * jnp.power(rate, passed / every)

    return schedule


def piecewise(
    steps: int,
    *,
    boundaries: tuple[int, ...],
    factors: tuple[float, ...],
    interpolate: bool = False,
    warmup_steps: int = 0,
) -> Schedule:
    """Constant pieces, or straight lines between given points.

    With pieces, the factor is `factors[i]` from step `boundaries[i - 1]` up to `boundaries[i]`, and
    jumps there. With `interpolate`, it is `factors[0]` at step 0, `factors[i + 1]` at step
    `boundaries[i]`, linear between and constant afterwards. A warm-up multiplies it.

    Args:
        steps: of the run; unused.
        boundaries: steps, increasing, above 0.
        factors: one more than boundaries.
        interpolate: straight lines instead of pieces.
        warmup_steps: W.

    >>> piecewise(6, boundaries=(2, 4), factors=(1.0, 0.5, 0.25))(np.arange(6)).tolist()
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """
    del steps
    check(
        len(factors) == len(boundaries) + 1,
        f"{len(boundaries)} boundaries need {len(boundaries) + 1} factors, not {len(factors)}",
    )
    check_boundaries(boundaries)
    check_factors(**{f"factors[{i}]": factor for i, factor in enumerate(factors)})
    check(warmup_steps >= 0, f"warmup_steps = {warmup_steps} should be 0 or more")
    values = np.asarray(factors, np.float32)

    def schedule(step):
        if interpolate:
            factor = jnp.interp(real(step), np.asarray((0, *boundaries), np.float32), values)
        else:
            index = jnp.searchsorted(np.asarray(boundaries, np.int32), step, side="right")
            factor = jnp.asarray(values)[index]
        return warmup(step, warmup_steps) * factor

    return schedule


SCHEDULES: dict[str, Callable[..., Any]] = {
    "constant": constant,
    "cosine": cosine,
    "exponential": exponential,
    "infinite": infinite,
    "inverse_square_root": inverse_square_root,
    "linear": linear,
    "one_cycle": one_cycle,
    "piecewise": piecewise,
    "plateau": plateau,
    "rewarm": rewarm,
    "wsd": wsd,
}
"""Name to factory: number of steps and keys to a function step -> factor; or, where the factor also
depends on the loss, to a `plateau.Controlled`."""

EXTENDABLE = ("constant", "exponential", "inverse_square_root", "piecewise", "plateau")


def extendable(name: str, *, anneal_steps: int = 0, **keys: Any) -> bool:
    """Returns whether a longer `steps` never changes the factors of earlier steps.

    Only then may a finished run be continued under the same config. "infinite" is extendable until
    it anneals. "wsd" is not as a whole: only its steps before the decay stay the same. A
    schedule that isn't in `SCHEDULES` counts as not extendable.

    Args:
        name: of the schedule.
        anneal_steps: of "infinite".
        **keys: its other keys, which don't matter.
    """
    del keys
    return name in EXTENDABLE or (name == "infinite" and not anneal_steps)
