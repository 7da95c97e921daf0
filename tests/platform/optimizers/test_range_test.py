"""The range test on functions whose limit is known: 2 / L for gradient descent on a quadratic."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.platform.errors import UserError
from lamina.platform.optimizers import range_test


def quadratic(condition, largest, size=12):
    curvatures = jnp.geomspace(largest / condition, largest, size)
    return lambda x: jnp.sum(curvatures * x**2) / 2


@pytest.mark.parametrize("largest", [0.5, 40.0])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_finds_the_limit_of_a_quadratic(condition, largest):
    start = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)
    before = np.asarray(start)
    found = range_test.find(quadratic(condition, largest), start)
    assert found.limit == pytest.approx(2 / largest, rel=0.2)
    assert found.suggestion < 2 / largest
    np.testing.assert_array_equal(start, before)


def test_the_blow_up_of_the_growing_run_alone_lies_above_the_limit():
    start = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)
    found = range_test.find(quadratic(1e2, 4.0), start, probe_steps=0)
    assert found.limit > 2 / 4.0


def test_a_rotated_quadratic_with_noise_in_it_is_no_harder():
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    matrix = jnp.asarray(basis @ np.diag(np.geomspace(0.1, 5.0, 8)) @ basis.T, jnp.float32)
    found = range_test.find(lambda x: x @ matrix @ x / 2 + 1.0, jnp.ones(8))
    assert found.limit == pytest.approx(2 / 5.0, rel=0.2)


def test_a_loss_below_zero_is_no_blow_up():
    start = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)
    loss = lambda x: quadratic(1e2, 4.0)(x) - 20.0
    found = range_test.find(loss, start)
    assert found.limit == pytest.approx(2 / 4.0, rel=0.2)
    assert found.suggestion < 2 / 4.0


def test_an_optimizer_of_the_table_and_its_keys_are_used():
    plain = range_test.find(quadratic(10.0, 1.0), jnp.ones(12), "adam")
    heavy = range_test.find(quadratic(10.0, 1.0), jnp.ones(12), "sgd", momentum=0.5)
    assert plain.suggestion > 0
    assert heavy.limit == pytest.approx(2 * (1 + 0.5), rel=0.2), "2 (1 + momentum) / L"


def test_a_range_without_instability_has_no_limit():
    found = range_test.find(quadratic(10.0, 1.0), jnp.ones(12), high=0.5, steps=60)
    assert found.limit is None


def test_smoothing_doesn_not_move_the_curve():
    rates = np.geomspace(1e-4, 1.0, 200)
    falling = 1 / (1 + (rates / 1e-2) ** 2)
    smoothed, end = range_test.smooth(falling, 0.9)
    assert end == 200
    at = lambda curve: rates[np.argmin(np.abs(curve - 0.5))]
    assert at(smoothed) == pytest.approx(at(falling), rel=0.1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"low": 1.0, "high": 0.1}, "0 < low < high"),
        ({"low": -1.0}, "0 < low < high"),
        ({"steps": 5}, "too short"),
        ({"low": 1e6, "high": 1e7}, "blows up at the lowest rate"),
        ({"optimizer": "sdg"}, "did you mean 'sgd'"),
    ],
)
def test_a_mistake_is_named(keys, message):
    with pytest.raises(UserError, match=message):
        range_test.find(quadratic(10.0, 1.0), jnp.ones(12), **keys)


def test_the_example_in_the_docstring_is_true():
    result = doctest.testmod(range_test, extraglobs={"jnp": jnp, "jax": jax})
    assert result.attempted
    assert not result.failed
