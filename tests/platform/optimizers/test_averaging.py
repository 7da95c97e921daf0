"""Averages of the parameters, against their definitions in numpy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.platform.optimizers import averaging

STEPS = 17
PATH = np.random.default_rng(0).normal(size=(STEPS + 1, 3, 2))
"""The parameters before the first step and after each."""


def followed(average):
    """Returns the weights to evaluate before the first step and after each."""

    def body(state, at):
        params, step = at
        state = average.update(state, params, step)
        return state, average.weights(state, params, step)

    start = jnp.asarray(PATH[0])
    state = average.init(start)
    first = average.weights(state, start, jnp.int32(0))
    steps = jnp.arange(1, STEPS + 1, dtype=jnp.int32)
    _, rest = jax.jit(lambda s, p: jax.lax.scan(body, s, (p, steps)))(state, jnp.asarray(PATH[1:]))
    return [np.asarray(first), *np.asarray(rest)]


pytestmark = pytest.mark.usefixtures("x64")


def test_the_moving_average_forgets_its_start():
    x = PATH[0]
    for step, found in enumerate(followed(averaging.ema(0.8))):
        if step:
            share = min(0.8, np.float32(step / (step + 9)))
            x = x + (1 - share) * (PATH[step] - x)
        np.testing.assert_allclose(found, x, atol=1e-7)  # the share is float32


@pytest.mark.parametrize(("start", "every"), [(0, 1), (4, 3), (5, 20)])
def test_stochastic_weight_averaging_is_the_mean_from_a_step_on(start, every):
    for step, found in enumerate(followed(averaging.swa(start, every))):
        chosen = [PATH[t] for t in range(start + every, step + 1, every)]
        expected = np.mean(chosen, axis=0) if chosen else PATH[step]
        np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize(("latest", "every"), [(1, 1), (3, 2), (4, 30)])
def test_latest_weight_averaging_is_the_mean_of_the_last_that_were_kept(latest, every):
    for step, found in enumerate(followed(averaging.lawa(latest, every))):
        chosen = [PATH[t] for t in range(every, step + 1, every)][-latest:]
        expected = np.mean(chosen, axis=0) if chosen else PATH[step]
        np.testing.assert_allclose(found, expected, atol=1e-10)
