"""Our optimizers against their papers' formulas, written out in numpy and float64."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from lamina.platform.optimizers import create, eval_params

pytestmark = pytest.mark.usefixtures("x64")
A, WD = 0.05, 0.1


def elementwise(rule, problem):
    """Returns the parameters after each step of `rule(theta, g, t, state) -> theta`."""
    start, grads = problem
    path = {}
    for name, theta in start.items():
        state, path[name] = {}, []
        for t, g in enumerate(grads[name], 1):
            theta = rule(theta, g, t, state)
            path[name].append(theta)
    return path


def averages(state, g, **decays):
    """Updates the averages of g (m...) and of its square (v) in `state`, and returns them."""
    for name, b in decays.items():
        value = g**2 if name == "v" else g
        state[name] = b * state.get(name, 0) + (1 - b) * value
    return [state[name] for name in decays]


def exadam(theta, g, t, state):
    b1, b2, eps = 0.8, 0.95, 1e-3
    m, v = averages(state, g, m=b1, v=b2)
    d1 = 1 + b2**t * v / (v + eps)
    d2 = 1 + b1**t * m**2 / (m**2 + eps)
    top = m * d1 / (1 - b1**t) + g * d1 / (1 - b1**t)
    return (1 - A * WD) * theta - A * top / (np.sqrt(v * d2 / (1 - b2**t)) + eps)


def ademamix(theta, g, t, state):
    b1, b2, b3, alpha, horizon = 0.9, 0.99, 0.999, 4.0, 12
    s = min(t / horizon, 1)
    slow = np.exp(np.log(b1) * np.log(b3) / ((1 - s) * np.log(b3) + s * np.log(b1)))
    m1, m2, v = averages(state, g, m=b1, m2=min(slow, b3), v=b2)
    step = (m1 / (1 - b1**t) + alpha * s * m2) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
    return theta - A * (step + WD * theta)


def mars(theta, g, t, state):
    b1, b2, gamma = 0.9, 0.98, 0.1
    c = g + gamma * b1 / (1 - b1) * (g - state.get("g", 0))
    state["g"] = g
    c = c / max(np.linalg.norm(c), 1)
    m, v = averages(state, c, m=b1, v=b2)
    step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
    return theta - A * (step + WD * theta)


def rprop(theta, g, t, state):
    before, s = state.get("g", 0 * g), state.get("s", np.full_like(g, A))
    change = g * before
    s = np.clip(s * np.where(change > 0, 1.2, np.where(change < 0, 0.5, 1)), 1e-3, 0.1)
    g = np.where(change < 0, 0, g)
    state.update(g=g, s=s)
    return theta - s * np.sign(g)


def core(theta, g, t, state, history=0, frozen=0.0):
    b1a, b1b, b1c, b2, eps = 0.7375, 0.8125, 5.0, 0.99, 1e-8
    b1 = b1b + (b1a - b1b) * np.exp(-(((t - 1) / b1c) ** 2))
    before = state.get("m", 0 * g)
    m, h = averages(state, g, m=b1, v=b2)
    plastic, score = np.ones_like(g), state.get("score", 0 * g)
    if history and t > history:
        highest = np.argsort(score.ravel())[score.size - int(frozen * score.size) :]
        plastic.ravel()[highest] = 0
        score = (1 - 1 / history) * score
    s, change = state.get("s", np.full_like(g, A)), m * before * plastic
    s = np.clip(s * np.where(change > 0, 1.2, np.where(change < 0, 0.7375, 1)), 1e-3, 0.2)
    u = m / (1 - b1**t) / (np.sqrt(h / (1 - b2**t)) + eps)
    step = plastic * u * s
    if history:
        score = score + m * step / history
    state.update(s=s, score=score)
    return theta - WD * np.abs(step) * theta - step


RULES = {
    "ademamix": (ademamix, {"b2": 0.99, "b3": 0.999, "alpha": 4.0, "warmup_steps": 12}),
    "core": (core, {"beta1_c": 5.0, "step_size_min": 1e-3, "step_size_max": 0.2}),
    "exadam": (exadam, {"b1": 0.8, "b2": 0.95, "eps": 1e-3}),
    "mars": (mars, {"b1": 0.9, "b2": 0.98, "gamma": 0.1}),
    "rprop": (rprop, {"step_size_min": 1e-3, "step_size_max": 0.1}),
}


@pytest.mark.parametrize("name", RULES)
def test_follows_the_papers_formula(name, problem, follow):
    rule, keys = RULES[name]
    keys = keys if name == "rprop" else keys | {"weight_decay": WD}
    path, _ = follow(create(name, A, **keys), *problem)
    expected = elementwise(rule, problem)
    for leaf in path:
        np.testing.assert_allclose(path[leaf], expected[leaf], rtol=1e-10, atol=1e-10)


def test_core_freezes_the_weights_of_the_highest_scores(problem, follow):
    keys = {"beta1_c": 5.0, "step_size_min": 1e-3, "step_size_max": 0.2}
    plastic = {"score_history": 6, "frozen": 0.3}
    path, state = follow(create("core", A, weight_decay=WD, **keys, **plastic), *problem)
    rule = lambda *args: core(*args, history=6, frozen=0.3)
    expected = elementwise(rule, problem)
    for leaf in path:
        np.testing.assert_allclose(path[leaf], expected[leaf], rtol=1e-10, atol=1e-10)
        still = np.diff(path[leaf], axis=0)[6:] == 0
        assert np.all(still.sum(axis=tuple(range(1, still.ndim))) == int(0.3 * still[0].size))
    assert np.all((state.sizes["vector"] >= 1e-3) & (state.sizes["vector"] <= 0.2))


def schedule_free(problem, direction, b1, warmup, r, power):
    """Returns (y after each step, the last x) by the paper's recursion."""
    start, grads = problem
    path, last = {}, {}
    for name, theta in start.items():
        x = z = y = theta
        state, total, path[name] = {}, 0.0, []
        for t, g in enumerate(grads[name], 1):
            rate = A * min(t / warmup, 1)
            z = z - rate * (direction(g, t, state) + WD * y)
            weight = t**r * rate**power
            total += weight
            c = weight / total
            x = (1 - c) * x + c * z
            y = (1 - b1) * z + b1 * x
            path[name].append(y)
        last[name] = x
    return path, last


def scaled_by_rms(g, t, state):
    (v,) = averages(state, g, v=0.999)
    return g / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


@pytest.mark.parametrize("r", [0.0, 1.0])
@pytest.mark.parametrize("warmup", [1, 8])
@pytest.mark.parametrize(
    ("name", "direction"), [("sgd", lambda g, t, s: g), ("adamw", scaled_by_rms)]
)
def test_schedule_free_follows_the_papers_recursion(name, direction, warmup, r, problem, follow):
    keys = {"warmup_steps": warmup, "r": r, "weight_decay": WD}
    optimizer = create(f"schedule_free_{name}", A, **keys)
    path, state = follow(optimizer, *problem)
    expected, average = schedule_free(problem, direction, 0.9, warmup, r, 2.0)
    got = eval_params(name, state, {leaf: path[leaf][-1] for leaf in path})
    for leaf in path:
        np.testing.assert_allclose(path[leaf], expected[leaf], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(got[leaf], average[leaf], rtol=1e-9, atol=1e-9)


def test_a_schedules_warm_up_is_that_of_the_method(problem, follow):
    ours, _ = follow(create("schedule_free_sgd", A, warmup_steps=8), *problem)
    rate = lambda count: A * jnp.minimum((count + 1) / 8.0, 1.0)
    scheduled, _ = follow(create("schedule_free_sgd", rate), *problem)
    np.testing.assert_allclose(ours["vector"], scheduled["vector"], rtol=1e-12)


def test_optaxs_schedule_free_warms_up_from_zero(problem, follow):
    ours, _ = follow(create("schedule_free_sgd", A, warmup_steps=8), *problem)
    theirs, _ = follow(contrib.schedule_free_sgd(A, warmup_steps=8), *problem)
    assert np.max(np.abs(ours["vector"][0] - problem[0]["vector"])) > 1e-3
    assert np.array_equal(theirs["vector"][0], problem[0]["vector"]), "a first step of rate 0"
    same, _ = follow(contrib.schedule_free_sgd(A), *problem)
    plain, _ = follow(create("schedule_free_sgd", A), *problem)
    np.testing.assert_allclose(same["vector"], plain["vector"], rtol=1e-10)


def soap(problem, every, wd):
    b1 = b2 = beta = 0.95
    (theta, grads), eps = (problem[0]["matrix"], problem[1]["matrix"]), 1e-8
    m = v = left = right = np.zeros_like(theta)
    ql = qr = np.eye(len(theta))
    path = []
    for k, g in enumerate(grads):
        if k:
            m, rotated = b1 * m + (1 - b1) * g, ql.T @ g @ qr
            v = b2 * v + (1 - b2) * rotated**2
            step = ql @ ((ql.T @ m @ qr) / (np.sqrt(v) + eps)) @ qr.T
            rate = A * np.sqrt(1 - b2**k) / (1 - b1**k)
            theta = theta - rate * step - A * wd * theta
        left = beta * left + (1 - beta) * g @ g.T
        right = beta * right + (1 - beta) * g.T @ g
        if k == 0:
            ql, qr = (np.linalg.eigh(x)[1][:, ::-1] for x in (left, right))
        elif k % every == 0:
            order_l = np.argsort(-np.diag(ql.T @ left @ ql))
            order_r = np.argsort(-np.diag(qr.T @ right @ qr))
            v = v[order_l][:, order_r]
            ql = np.linalg.qr(left @ ql[:, order_l])[0]
            qr = np.linalg.qr(right @ qr[:, order_r])[0]
        path.append(theta)
    return path


@pytest.mark.parametrize("every", [1, 3])
def test_soap_follows_its_algorithm(every, problem, follow):
    optimizer = create("soap", A, weight_decay=WD, precondition_every=every)
    path, _ = follow(optimizer, *problem)
    np.testing.assert_allclose(path["matrix"], soap(problem, every, WD), rtol=1e-9, atol=1e-9)
    assert np.array_equal(path["vector"][0], problem[0]["vector"]), "the first call makes no step"


def test_muon_follows_its_algorithm_and_adamw_has_the_vectors(problem, follow):
    path, _ = follow(create("muon", A, weight_decay=WD, adam_weight_decay=WD), *problem)
    theta, buffer = problem[0]["matrix"], 0
    for t, g in enumerate(problem[1]["matrix"]):
        buffer = 0.95 * buffer + g
        x = g + 0.95 * buffer
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        theta = theta - A * (x + WD * theta)
        np.testing.assert_allclose(path["matrix"][t], theta, rtol=1e-10, atol=1e-10)
    adamw, _ = follow(optax.adamw(A, b2=0.95, weight_decay=WD), *problem)
    np.testing.assert_allclose(path["vector"], adamw["vector"], rtol=1e-10)


def test_optaxs_muon_corrects_the_bias_and_so_differs_from_the_second_step_on(problem, follow):
    ours, _ = follow(create("muon", A), *problem)
    theirs, _ = follow(contrib.muon(A), *problem)
    gap = np.abs(ours["matrix"] - theirs["matrix"]).max(axis=(1, 2))
    assert gap[0] < 1e-6
    assert gap[1] > 1e-4


def test_optaxs_ademamix_counts_from_zero(problem, follow):
    ours, _ = follow(create("ademamix", A, warmup_steps=12, alpha=5.0), *problem)
    late = lambda count: 5.0 * jnp.minimum(count / 12.0, 1.0)
    theirs, _ = follow(contrib.ademamix(A, alpha=late), *problem)
    assert np.abs(ours["vector"] - theirs["vector"]).max() > 1e-3


def test_optaxs_rprop_is_one_step_late(problem, follow):
    ours, _ = follow(create("rprop", A), *problem)
    theirs, _ = follow(optax.rprop(A), *problem)
    assert np.array_equal(theirs["vector"][0], problem[0]["vector"])
    assert np.all(ours["vector"][0] != problem[0]["vector"])
