"""Loss scaling doubles after good steps, halves and skips the update on overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.platform.optimizers import loss_scale


def test_the_scale_doubles_after_2000_good_steps():
    advance = jax.jit(
        lambda state, n: jax.lax.fori_loop(
            0, n, lambda _, s: loss_scale.update(s, jnp.bool_(True)), state
        )
    )
    state = advance(loss_scale.init(), 1999)
    assert (state.scale, state.good_steps) == (2.0**15, 1999)
    state = advance(state, 1)
    assert (state.scale, state.good_steps) == (2.0**16, 0)
    assert advance(state, 2000 * 20).scale == 2.0**24, "it stops growing there"


def test_an_overflow_halves_the_scale_and_starts_the_count_again():
    state = loss_scale.LossScale(jnp.float32(8.0), jnp.int32(1500))
    state = loss_scale.update(state, jnp.bool_(False))
    assert (state.scale, state.good_steps) == (4.0, 0)
    for _ in range(5):
        state = loss_scale.update(state, jnp.bool_(False))
    assert state.scale == 1.0, "it doesn't fall below 1"


def test_the_state_keeps_its_types():
    state = loss_scale.update(loss_scale.init(), jnp.bool_(True), interval=1)
    assert (state.scale.dtype, state.good_steps.dtype) == (jnp.float32, jnp.int32)
    assert not state.scale.weak_type


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_step_with_an_overflow_is_skipped(bad):
    before = {"w": jnp.ones(3), "count": jnp.int32(4)}
    after = {"w": jnp.zeros(3), "count": jnp.int32(5)}
    finite = loss_scale.all_finite({"a": jnp.ones(2), "b": jnp.array([1.0, bad])})
    assert not finite
    kept = loss_scale.keep(finite, after, before)
    np.testing.assert_array_equal(kept["w"], before["w"])
    assert kept["count"] == 4
    taken = loss_scale.keep(loss_scale.all_finite({"a": jnp.ones(2)}), after, before)
    assert taken["count"] == 5
    assert loss_scale.all_finite({})
