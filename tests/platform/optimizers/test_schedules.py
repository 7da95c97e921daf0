"""Schedules against their formulas in float64, their joins and ends, and what may be extended."""

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lamina.platform.errors import UserError
from lamina.platform.optimizers import schedules
from lamina.platform.optimizers.plateau import Controlled, PlateauState, current_factor
from lamina.platform.optimizers.schedules import SCHEDULES, extendable

STEPS, WARM = 200, 20


def shared_steps(short, long, steps: int) -> int:
    """Returns for how many first steps, of `steps`, two schedules have the same factors."""
    numbers = np.arange(steps, dtype=np.int32)
    differ = np.asarray(short(numbers)) != np.asarray(long(numbers))
    return int(np.argmax(differ)) if differ.any() else steps


KEYS = {
    "constant": {"warmup_steps": WARM},
    "cosine": {"warmup_steps": WARM, "final_factor": 0.1},
    "exponential": {"warmup_steps": WARM, "rate": 0.5, "every": 30},
    "infinite": {"warmup_steps": WARM, "cooldown_steps": 60, "anneal_steps": 40},
    "inverse_square_root": {"warmup_steps": WARM},
    "linear": {"warmup_steps": WARM, "final_factor": 0.25},
    "one_cycle": {},
    "piecewise": {"boundaries": (50, 150), "factors": (1.0, 0.3, 0.6), "interpolate": True},
    "plateau": {"warmup_steps": WARM},
    "rewarm": {"boundaries": (80,), "warmup_fraction": 0.1},
    "wsd": {"warmup_steps": WARM, "decay_fraction": 0.25},
}


def build(name, steps, **keys):
    """Returns the function of the step, which is all that a schedule without control is."""
    built = SCHEDULES[name](steps, **keys)
    return built.schedule if isinstance(built, Controlled) else built


def one_cycle_formula(s):
    x = s / 60 if s < 60 else (s - 60) / 140
    a, b = (0.04, 1.0) if s < 60 else (1.0, 4e-6)
    return b + (a - b) * (1 + math.cos(math.pi * x)) / 2


def infinite_formula(s):
    if s >= STEPS - 40:
        return 0.55 * (0.1 / 0.55) ** ((s - STEPS + 40) / 40)
    return 0.55 + 0.45 * (1 + math.cos(math.pi * min((s - WARM) / 60, 1))) / 2


def rewarm_formula(s):
    start, length, before = (0, 80, 0.0) if s < 80 else (80, 120, 0.1)
    rise = round(0.1 * length)
    if s - start < rise:
        return before + (1 - before) * (s - start + 1) / rise
    x = min((s - start - rise) / (length - rise), 1)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2


AFTER_WARMUP = {
    "constant": lambda s: 1.0,
    "cosine": lambda s: 0.1 + 0.9 * (1 + math.cos(math.pi * (s - WARM) / (STEPS - WARM))) / 2,
    "exponential": lambda s: 0.5 ** ((s - WARM) / 30),
    "infinite": infinite_formula,
    "plateau": lambda s: 1.0,
    "rewarm": rewarm_formula,
    "inverse_square_root": lambda s: math.sqrt(WARM / (s + 1)),
    "linear": lambda s: 1 - 0.75 * (s - WARM) / (STEPS - WARM),
    "one_cycle": one_cycle_formula,
    "piecewise": lambda s: float(np.interp(s, [0, 50, 150], [1.0, 0.3, 0.6])),
    "wsd": lambda s: 1.0 if s < 150 else 1 - math.sqrt((s - 150) / 50),
}


def formula(name, s):
    if KEYS[name].get("warmup_steps", 0) > s:
        return (s + 1) / WARM
    return AFTER_WARMUP[name](s)


@pytest.mark.parametrize("name", SCHEDULES)
def test_follows_its_formula_at_every_step(name):
    steps = np.arange(STEPS + 1)
    got = jax.jit(build(name, STEPS, **KEYS[name]))(steps)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [formula(name, int(s)) for s in steps], rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_single_step_number_gives_the_same_as_an_array_of_them(name):
    schedule = build(name, STEPS, **KEYS[name])
    all_steps = schedule(np.arange(STEPS))
    for step in (0, WARM - 1, WARM, 150, STEPS - 1):
        assert schedule(step) == pytest.approx(float(all_steps[step]), rel=1e-6, abs=2e-7)
        traced = jax.jit(schedule)(jnp.int32(step))
        assert traced.shape == ()
        assert traced == pytest.approx(float(all_steps[step]), rel=1e-6, abs=2e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_is_continuous_at_its_joins(name):
    """With ten times the steps, the largest jump between two steps is about ten times smaller."""
    keys = dict(KEYS[name])
    if name == "wsd":
        keys["shape"] = "linear"  # the square root has a vertical tangent where its decay starts
    fine = {
        "warmup_steps": lambda v: 10 * v,
        "every": lambda v: 10 * v,
        "cooldown_steps": lambda v: 10 * v,
        "anneal_steps": lambda v: 10 * v,
        "boundaries": lambda v: tuple(10 * b for b in v),
    }
    long_keys = {k: fine.get(k, lambda v: v)(v) for k, v in keys.items()}
    jump = lambda f, n: np.abs(np.diff(np.asarray(f(np.arange(n))))).max()
    coarse = jump(build(name, STEPS, **keys), STEPS)
    assert jump(build(name, 10 * STEPS, **long_keys), 10 * STEPS) < 0.12 * coarse


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_step_has_a_factor_above_zero_and_none_has_one_above_the_peak(name):
    factors = np.asarray(build(name, STEPS, **KEYS[name])(np.arange(STEPS)))
    assert factors[0] > 0
    assert factors.min() > 0
    assert factors.max() == 1.0


@pytest.mark.parametrize(
    ("name", "end"),
    [("cosine", 0.1), ("linear", 0.25), ("one_cycle", 4e-6), ("wsd", 0.0)],
)
def test_the_final_factor_is_reached_when_the_run_is_over_and_kept(name, end):
    factors = build(name, STEPS, **KEYS[name])(np.array([STEPS, STEPS + 1, 10 * STEPS]))
    np.testing.assert_allclose(factors, end, atol=1e-7)


def test_one_cycle_equals_optaxs():
    ours = SCHEDULES["one_cycle"](STEPS)(np.arange(STEPS + 1))
    theirs = optax.cosine_onecycle_schedule(STEPS, 1.0)
    np.testing.assert_allclose(ours, [theirs(s) for s in range(STEPS + 1)], rtol=1e-5, atol=2e-7)


def test_wsd_decays_linearly_if_asked_to():
    factors = SCHEDULES["wsd"](10, decay_fraction=0.4, shape="linear", final_factor=0.2)
    expected = [1.0] * 7 + [0.8, 0.6, 0.4, 0.2]
    np.testing.assert_allclose(factors(np.arange(11)), expected, rtol=1e-6)


def test_pieces_jump_at_their_boundaries():
    factors = SCHEDULES["piecewise"](9, boundaries=(3, 6), factors=(1.0, 0.1, 0.01))
    np.testing.assert_allclose(factors(np.arange(9)), [1.0] * 3 + [0.1] * 3 + [0.01] * 3, rtol=1e-6)


def test_no_warm_up_starts_at_the_peak():
    for name in ("constant", "cosine", "linear", "wsd"):
        assert build(name, STEPS)(0) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_extendable_says_whether_more_steps_leave_the_past_alone(name):
    short, long = (build(name, n, **KEYS[name]) for n in (STEPS, 2 * STEPS))
    assert extendable(name, **KEYS[name]) == (shared_steps(short, long, STEPS) == STEPS)


def test_an_infinite_schedule_is_extendable_until_it_anneals():
    keys = {"warmup_steps": WARM, "cooldown_steps": 60}
    assert extendable("infinite", **keys)
    short, long = (SCHEDULES["infinite"](n, **keys) for n in (STEPS, 9 * STEPS))
    assert shared_steps(short, long, STEPS) == STEPS
    assert long(9 * STEPS) == pytest.approx(0.55)


def test_a_stage_of_rewarm_knows_only_its_own_length():
    alone = SCHEDULES["rewarm"](80, boundaries=())(np.arange(80))
    first = SCHEDULES["rewarm"](300, boundaries=(80, 200))(np.arange(80))
    np.testing.assert_array_equal(alone, first)
    later = SCHEDULES["rewarm"](320, boundaries=(100, 220))(np.arange(100, 220))
    np.testing.assert_allclose(
        later, SCHEDULES["rewarm"](300, boundaries=(80, 200))(np.arange(80, 200)), rtol=1e-6
    )


def lowered(losses, **keys):
    """The factor of the updates after each loss."""
    control = SCHEDULES["plateau"](1, **keys).controller
    state, factors = control.init(None), []
    for loss in losses:
        update, state = control.update(jnp.ones(()), state, value=loss)
        factors.append(float(update))
        assert current_factor((state, {})) == factors[-1]
    return factors


def test_a_plateau_lowers_the_rate_after_windows_that_are_no_better():
    falling = [8.0, 6.0, 5.0, 3.0, 2.0, 2.0]
    assert lowered(falling, every=2, patience=1) == [1.0] * 6
    flat = [4.0, 4.0, 4.0, 4.0, 5.0, 3.0, 4.0, 4.0, 9.0]
    got = lowered(flat, every=2, patience=2, factor=0.5)
    assert got == [1.0] * 5 + [0.5] * 3 + [0.5]
    assert lowered([1.0] * 40, every=1, patience=1, factor=0.5, min_factor=0.2)[-1] == (
        pytest.approx(0.2)
    )


def test_a_plateaus_numbers_may_be_traced():
    def last(factor, tolerance):
        control = SCHEDULES["plateau"](1, factor=factor, tolerance=tolerance, every=1, patience=1)
        control = control.controller
        step = lambda state, loss: (control.update(jnp.ones(()), state, value=loss)[1], None)
        return jax.lax.scan(step, control.init(None), jnp.array([1.0, 0.95, 0.95]))[0].factor

    got = jax.vmap(last)(jnp.array([0.5, 0.5]), jnp.array([0.0, 0.1]))
    np.testing.assert_allclose(got, [0.5, 0.25])
    assert isinstance(SCHEDULES["plateau"](1).controller.init(None), PlateauState)


def test_a_users_own_schedule_is_not_taken_to_be_extendable():
    assert not extendable("mine.module:schedule")


def test_wsd_is_shared_until_the_shorter_one_decays():
    keys = {"warmup_steps": 10, "decay_fraction": 0.1}
    short, long = (SCHEDULES["wsd"](n, **keys) for n in (100, 300))
    assert shared_steps(short, long, 100) == 91, "step 90, the first of the decay, has factor 1"


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_numbers_among_the_keys_may_be_traced(name):
    plain = {k: v for k, v in KEYS[name].items() if type(v) in (int, float)}
    others = {k: v for k, v in KEYS[name].items() if k not in plain}

    def factors(keys):
        return build(name, STEPS, **keys, **others)(np.arange(STEPS))

    stacked = {k: jnp.array([v, v / 2], jnp.asarray(v).dtype) for k, v in plain.items()}
    got = jax.vmap(factors)(stacked)[0] if plain else factors({})
    np.testing.assert_allclose(got, factors(plain), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("linear", {"warmup_steps": -1}, "warmup_steps = -1"),
        ("constant", {"warmup_steps": -1}, "should be 0 or more"),
        ("wsd", {"warmup_steps": 150, "decay_fraction": 0.5}, "exceed 200 steps"),
        ("infinite", {"cooldown_steps": 150, "anneal_steps": 100}, "take 250 of 200 steps"),
        ("plateau", {"factor": 1.0}, "factor = 1.0"),
        ("plateau", {"every": 0}, "every = 0"),
        ("rewarm", {"boundaries": (300,)}, "above 0 and below the 200 steps"),
        ("rewarm", {"boundaries": ("a",)}, "should be increasing whole numbers"),
        ("rewarm", {"boundaries": (100,), "final_factor": -0.1}, "final_factor = -0.1"),
        ("linear", {"final_factor": float("nan")}, "final_factor = nan should be a number"),
        ("cosine", {"final_factor": -1.0}, "final_factor = -1.0"),
        ("wsd", {"final_factor": -1.0}, "final_factor = -1.0"),
        ("one_cycle", {"start_factor": -1.0}, "start_factor = -1.0"),
        ("wsd", {"decay_fraction": 1.5}, "decay_fraction = 1.5"),
        ("wsd", {"shape": "cosine"}, "'linear' or 'sqrt'"),
        ("one_cycle", {"rise_fraction": 1.0}, "rise_fraction"),
        ("inverse_square_root", {"warmup_steps": 0}, "should be 1 or more"),
        ("exponential", {"rate": 0.0}, "rate = 0.0"),
        ("exponential", {"rate": 0.5, "every": 0}, "every = 0"),
        ("piecewise", {"boundaries": (3,), "factors": (1.0,)}, "1 boundaries need 2 factors"),
        ("piecewise", {"boundaries": (3, 3), "factors": (1.0, 0.5, 0.1)}, "increasing"),
        ("piecewise", {"boundaries": (3,), "factors": (1.0, -0.5)}, r"factors\[1\] = -0.5"),
        ("piecewise", {"boundaries": (2.5,), "factors": (1.0, 0.5)}, "whole numbers"),
        ("piecewise", {"boundaries": (0,), "factors": (1.0, 0.5)}, "above 0"),
    ],
)
def test_a_mistake_is_named(name, keys, message):
    with pytest.raises(UserError, match=message):
        build(name, STEPS, **keys)


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(schedules)
    assert result.attempted
    assert not result.failed
