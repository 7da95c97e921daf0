"""Every optimizer of the table runs in the step; some against their formulas; wrong keys raise."""

import doctest
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lamina.platform.errors import UserError
from lamina.platform.optimizers import adapted, table
from lamina.platform.optimizers.table import CONVENTIONS, OPTIMIZERS, create, options

PARAMETER_FREE = ("cocob", "dadapt_adamw", "dog", "dowg", "lbfgs", "momo", "polyak_sgd", "prodigy")
TARGET = {"w": jnp.array([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]]), "b": jnp.array([0.5, -0.5, 2.0])}


def start():
    return {"w": jnp.full((2, 3), 0.2), "b": jnp.array([0.1, 0.4, -0.3])}


def quadratic(params):
    return sum(jnp.sum((params[k] - TARGET[k]) ** 2) for k in params) / 2


def one_step(optimizer, carry):
    params, state = carry
    value, grads = jax.value_and_grad(quadratic)(params)
    updates, state = optimizer.update(
        grads, state, params, value=value, grad=grads, value_fn=quadratic, metrics={}
    )
    return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(optimizer, steps):
    """Runs in a scan, as training does: the state must keep its types."""
    params = start()
    carry = (params, optimizer.init(params))
    return jax.lax.scan(lambda c, _: (one_step(optimizer, c), None), carry, length=steps)[0]


def excess(params):
    """The quadratic in float64: the first steps of parameter-free methods are tiny."""
    gap = lambda k: np.asarray(params[k], np.float64) - np.asarray(TARGET[k], np.float64)
    return sum(np.sum(gap(k) ** 2) for k in params)


def peak(name):
    return 1.0 if name in PARAMETER_FREE else 0.01


@functools.cache
def after_three_steps(name):
    return run(create(name, peak(name)), 3)[0]


QUICK = ("adamw", "lion", "muon", "prodigy", "schedule_free_adamw", "sgd", "sm3")
ALL = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS]


@pytest.mark.parametrize("name", ALL)
def test_reduces_a_quadratic_in_a_compiled_scan_and_keeps_the_parameters_types(name):
    params = after_three_steps(name)
    assert excess(params) < excess(start())
    assert [p.dtype for p in jax.tree.leaves(params)] == [jnp.float32, jnp.float32]


@pytest.mark.parametrize("name", ALL)
def test_uncompiled_steps_under_a_constant_schedule_are_the_same_as_compiled_ones(name):
    optimizer = create(name, lambda count: jnp.full((), peak(name)))
    carry = (start(), optimizer.init(start()))
    for _ in range(3):
        carry = one_step(optimizer, carry)
    compiled = after_three_steps(name)
    for key in compiled:
        np.testing.assert_allclose(compiled[key], carry[0][key], rtol=2e-4, atol=2e-6)


def traced(optimizer):
    """The text of the computation of one step from a new state."""
    step = lambda params: one_step(optimizer, (params, optimizer.init(params)))
    return re.sub(r"0x[0-9a-f]+|_\w+ at", "", str(jax.make_jaxpr(step)(start())))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_takes_a_schedule(name):
    assert "0.625" in traced(create(name, lambda count: jnp.where(count < 5, 0.625, 0.5)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_hold_only_what_a_config_can_and_the_defaults_are_the_librarys(name):
    keys = {key: option.default for key, option in options(name).items()}
    assert all(isinstance(value, bool | int | float | str | tuple) for value in keys.values())
    assert traced(create(name, peak(name))) == traced(create(name, peak(name), **keys))


def trajectory(name, steps=20, **keys):
    """Parameters after each step on gradients that don't depend on them."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=5)
    grads = rng.normal(size=(steps, 5))
    optimizer = create(name, 0.05, **keys)
    params, state = jnp.asarray(theta, jnp.float32), None
    state = optimizer.init(params)

    def body(carry, grad):
        params, state = carry
        updates, state = optimizer.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), params + updates

    _, path = jax.lax.scan(body, (params, state), jnp.asarray(grads, jnp.float32))
    return theta, grads, np.asarray(path)


def test_adamw_follows_its_formula():
    theta, grads, path = trajectory("adamw", b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.3)
    m = v = np.zeros(5)
    for t, g in enumerate(grads, 1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
        theta = theta - 0.05 * (step + 0.3 * theta)
        np.testing.assert_allclose(path[t - 1], theta, rtol=1e-5, atol=1e-6)


def test_nesterov_momentum_follows_pytorchs_convention():
    theta, grads, path = trajectory("sgd", momentum=0.9, nesterov=True)
    buffer = np.zeros(5)
    for t, g in enumerate(grads):
        buffer = 0.9 * buffer + g
        theta = theta - 0.05 * (g + 0.9 * buffer)
        np.testing.assert_allclose(path[t], theta, rtol=1e-5, atol=1e-6)


def test_lion_follows_its_formula():
    theta, grads, path = trajectory("lion", b1=0.9, b2=0.95, weight_decay=0.1)
    m = np.zeros(5)
    for t, g in enumerate(grads):
        theta = theta - 0.05 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * theta)
        m = 0.95 * m + 0.05 * g
        np.testing.assert_allclose(path[t], theta, rtol=1e-5, atol=1e-6)


def test_ademamix_warms_up_from_step_one_as_in_the_paper():
    b1, b2, b3, alpha, horizon = 0.9, 0.99, 0.999, 4.0, 12
    theta, grads, path = trajectory(
        "ademamix", b1=b1, b2=b2, b3=b3, alpha=alpha, warmup_steps=horizon
    )
    m1 = m2 = v = np.zeros(5)
    for t, g in enumerate(grads, 1):
        s = min(t / horizon, 1)
        slow = np.exp(np.log(b1) * np.log(b3) / ((1 - s) * np.log(b3) + s * np.log(b1)))
        slow = min(slow, b3)
        m1, v = b1 * m1 + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m2 = slow * m2 + (1 - slow) * g
        step = (m1 / (1 - b1**t) + alpha * s * m2) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        theta = theta - 0.05 * step
        np.testing.assert_allclose(path[t - 1], theta, rtol=2e-5, atol=2e-6)


def test_polyak_steps_shrink_with_the_learning_rate():
    full, _ = run(create("polyak_sgd", 1.0), 1)
    half, _ = run(create("polyak_sgd", 0.5), 1)
    before = start()
    for key in before:
        moved = np.asarray(full[key] - before[key])
        np.testing.assert_allclose(half[key] - before[key], moved / 2, rtol=1e-5)
    assert optax.polyak_sgd(1.0, scaling=1.0)
    np.testing.assert_allclose(full["b"], run(optax.polyak_sgd(), 1)[0]["b"], rtol=1e-6)


def test_lbfgs_with_a_line_search_solves_a_quadratic_at_once():
    for search in ("zoom", "backtracking"):
        params, _ = run(create("lbfgs", 1.0, line_search=search), 5)
        assert excess(params) < 1e-6


def test_numbers_may_be_traced_so_that_sweeps_can_be_vectorised():
    def final(learning_rate, weight_decay):
        return run(create("adamw", learning_rate, weight_decay=weight_decay), 3)[0]["b"]

    def traced(learning_rate, weight_decay):
        optimizer = create("adamw", learning_rate, weight_decay=weight_decay)
        carry = (start(), optimizer.init(start()))
        return one_step(optimizer, one_step(optimizer, one_step(optimizer, carry)))[0]["b"]

    rates, decays = jnp.array([0.01, 0.1]), jnp.array([0.0, 0.5])
    both = jax.jit(jax.vmap(traced))(rates, decays)
    np.testing.assert_allclose(both[1], final(0.1, 0.5), rtol=1e-5)


def numeric(name):
    """The float keys of an optimizer and their defaults, without those that 0 switches off."""
    keys = options(name).items()
    return {k: o.default for k, o in keys if o.type is float and o.default != 0}


# The basis that SOAP takes for a gradient without full rank, as here, is any of many: the numbers
# then depend on rounding. Its own tests have gradients of full rank.
@pytest.mark.parametrize("name", [n for n in ALL if getattr(n, "values", (n,)) != ("soap",)])
def test_every_float_may_be_traced_and_gives_what_the_plain_number_gives(name):
    def final(learning_rate, keys):
        optimizer = create(name, learning_rate, **keys)
        carry = (start(), optimizer.init(start()))
        return jax.lax.scan(lambda c, _: (one_step(optimizer, c), None), carry, length=3)[0][0]

    rates = jnp.array([peak(name), peak(name) / 2])
    keys = {k: jnp.array([v, v * 0.99]) for k, v in numeric(name).items()}
    vectorised = jax.jit(jax.vmap(final))(rates, keys)
    for key, expected in after_three_steps(name).items():
        np.testing.assert_allclose(vectorised[key][0], expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_factory_looks_at_a_traced_number(name):
    def step(learning_rate, keys):
        optimizer = create(name, learning_rate, **keys)
        return one_step(optimizer, (start(), optimizer.init(start())))

    jax.eval_shape(step, jnp.float32(0.1), {k: jnp.float32(v) for k, v in numeric(name).items()})


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("adamw", {"learning_rate": -1e-3}, r"learning_rate = -0.001 should lie in \[0, inf\)"),
        ("adamw", {"learning_rate": float("nan")}, "learning_rate = nan"),
        ("adamw", {"b1": 1.0}, r"b1 = 1.0 should lie in \[0, 1\)"),
        ("adamw", {"b2": -0.1}, "b2 = -0.1"),
        ("adamw", {"weight_decay": -1.0}, "weight_decay = -1.0"),
        ("prodigy", {"betas": (0.9, 1.5)}, "betas"),
        ("sgd", {"momentum": 2.0}, "momentum = 2.0"),
        ("rmsprop", {"decay": float("inf")}, "decay = inf"),
        ("adamw", {"learning_rate": jnp.array(-1.0)}, "should lie in"),
        ("adamw", {"b1": np.array(1.0)}, "should lie in"),
        ("ademamix", {"alpha": -5.0}, "alpha = -5.0"),
        ("lars", {"trust_coefficient": 0.0}, "trust_coefficient = 0.0"),
        ("polyak_sgd", {"f_min": float("nan")}, "f_min = nan should be a number"),
        ("rprop", {"step_size_min": 1.0, "step_size_max": 0.1}, "1.0 exceeds step_size_max = 0.1"),
        ("core", {"step_size_min": 1.0}, "1.0 exceeds step_size_max = 0.01"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_early(name, keys, message):
    keys = {"learning_rate": 0.1} | keys
    with pytest.raises(UserError, match=message):
        create(name, **keys)


def test_a_state_made_under_jit_can_be_donated_with_the_parameters():
    for name in ("dog", "dowg", "cocob", "madgrad", "schedule_free_sgd", "prodigy"):
        optimizer = create(name, 1.0)
        step = jax.jit(lambda c, o=optimizer: one_step(o, c), donate_argnums=0)
        carry = jax.jit(lambda o=optimizer: (start(), o.init(start())))()
        assert np.all(np.isfinite(step(step(carry))[0]["b"]))


def test_a_factory_of_the_users_own_takes_the_place_of_a_name():
    def mine(learning_rate, power: float = 1, *, name: str = "x", nothing: int | None = None):
        assert isinstance(power, float)
        assert nothing is None
        return optax.sgd(learning_rate * power)

    keys = {k: (o.type, o.default) for k, o in options(mine).items()}
    assert keys == {
        "power": (float, 1.0),
        "name": (str, "x"),
        "nothing": (int, 0),
    }
    optimizer = create(mine, 1.0, power=2, nothing=0)
    updates, _ = optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2), value=1.0)
    np.testing.assert_array_equal(updates, [-2.0, -2.0])


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: optax.sgd(0.1), r"too many positional arguments.* takes \(learning_rate, "),
        (lambda learning_rate, other: optax.sgd(0.1), "missing a required argument: 'other'"),
        (lambda learning_rate: None, "returns a NoneType, not a gradient transformation"),
    ],
)
def test_a_factory_that_is_no_optimizers_is_refused(factory, message):
    with pytest.raises(UserError, match=message):
        create(factory, 0.1)


def test_required_keys_of_a_factory_are_asked_for():
    def mine(learning_rate, *, power: float):
        return optax.sgd(learning_rate * power)

    with pytest.raises(UserError, match="power must be given"):
        create(mine, 0.1)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("adamv", {}, "did you mean 'adam"),
        ("adamw", {"weigth_decay": 0.1}, "did you mean 'weight_decay'.*valid are b1"),
        ("adamw", {"b1": "0.9"}, "b1 = '0.9' should be a float"),
        ("adamw", {"b1": True}, "should be a float"),
        ("adamw", {"mask": 1.0}, "mask is not a key"),
        ("adamw", {"nesterov": 1}, "should be a bool"),
        ("adamw", {"mu_dtype": "float12"}, "should name a data type"),
        ("lbfgs", {"line_search": "zoo"}, "one of 'zoom', 'backtracking', 'none'"),
        ("muon", {"ns_steps": 2.5}, "should be an int"),
        ("muon", {"adam_learning_rate": 0.1}, "is not a key"),
        ("prodigy", {"betas": 0.9}, "should be a tuple"),
        ("prodigy", {"betas": (0.9, 0.99, 0.9)}, r"should look like \(0.9, 0.999\)"),
        ("prodigy", {"betas": ("a", "b")}, "should look like"),
        ("adamw", {"b1": np.array([0.9, 0.8])}, "should be a float"),
        ("muon", {"ns_steps": np.float32(2.5)}, "should be an int"),
        ("adamw", {"learning_rate": "0.1"}, "learning_rate = '0.1' should be a float"),
        ("adamw", {"learning_rate": None}, "learning_rate = None should be a float"),
        ("adamw", {"learning_rate": np.ones(2)}, "should be a float"),
        (None, {}, "optimizer.name = None should be text"),
    ],
)
def test_a_mistake_names_what_is_valid(name, keys, message):
    with pytest.raises(UserError, match=message):
        create(name, **{"learning_rate": 0.1} | keys)


def test_what_optax_takes_is_taken_from_python_too():
    mask = {"w": True, "b": False}
    optimizer = create("adamw", 0.1, weight_decay=0.5, mask=mask, mu_dtype=jnp.bfloat16)
    params = start()
    state = optimizer.init(params)
    assert state[0].mu["b"].dtype == jnp.bfloat16
    moved = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)[0]
    np.testing.assert_allclose(moved["w"], -0.05 * params["w"], rtol=1e-6)
    assert not np.any(moved["b"])
    assert not jax.tree.leaves(create("sgd", 0.1, momentum=None).init(params))


def test_zero_stands_for_none_where_the_library_takes_none():
    state = create("sgd", 0.1, momentum=0.0).init(start())
    assert not jax.tree.leaves(state), "momentum 0 should hold no buffer"
    assert jax.tree.leaves(create("sgd", 0.1, momentum=0.9).init(start()))
    moments = create("adamw", 0.1, mu_dtype="bfloat16").init(start())[0].mu
    assert moments["b"].dtype == jnp.bfloat16


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(table)
    assert result.attempted
    assert not result.failed


def test_the_guide_has_a_line_for_every_optimizer():
    guide = (Path(__file__).parents[3] / "docs" / "optimizers.md").read_text()
    assert [n for n in OPTIMIZERS if f"| `{n}` | " not in guide] == []


def test_conventions_are_about_optimizers_that_exist():
    assert CONVENTIONS.keys() <= OPTIMIZERS.keys()
    assert adapted.lbfgs is OPTIMIZERS["lbfgs"]
