"""Each method against its formula, written out in numpy float64."""

import functools
import itertools

import jax
import numpy as np
import pytest

from lamina.platform import merging
from lamina.platform.checkpoints.names import flatten

W = np.asarray([0.5, 0.3, 0.9])
pairs = functools.partial(zip, strict=True)


@pytest.fixture
def inputs():
    random = np.random.default_rng(0)
    shapes = {"matrix": (6, 9), "vector": (11,)}
    draw = lambda: {name: random.standard_normal(shape) for name, shape in shapes.items()}
    base = draw()
    models = [{n: base[n] + 0.2 * v for n, v in draw().items()} for _ in range(3)]
    return base, models


def check(name, inputs, formula, weights=None, models=None, **keys):
    """Merges in float64, and holds each tensor to `formula(name, base, models)`."""
    base, all_models = inputs
    chosen = all_models if models is None else models
    with jax.enable_x64(True):
        merged = merging.create(name, **keys)(chosen, base=base, weights=weights)
    for tensor, found in flatten(merged).items():
        assert found.dtype == np.float64
        expected = formula(tensor, base[tensor], [m[tensor] for m in chosen])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_linear_is_the_weighted_mean(inputs):
    check("linear", inputs, lambda n, b, m: sum(w * x for w, x in pairs(W, m)) / W.sum(), W)


def test_linear_without_normalisation_is_the_weighted_sum(inputs):
    formula = lambda n, b, m: sum(w * x for w, x in pairs(W, m))
    check("linear", inputs, formula, W, normalize=False)


@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic_adds_scaled_task_vectors(inputs, normalize):
    factor = 0.7 / (W.sum() if normalize else 1)
    formula = lambda n, b, m: b + factor * sum(w * (x - b) for w, x in pairs(W, m))
    check("task_arithmetic", inputs, formula, W, scale=0.7, normalize=normalize)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_goes_along_the_arc(inputs, t):
    def formula(name, base, models):
        a, c = models
        cosine = (a * c).sum() / np.sqrt((a * a).sum() * (c * c).sum())
        angle = np.arccos(cosine)
        return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * c) / np.sin(angle)

    check("slerp", inputs, formula, models=inputs[1][:2], t=t)


def test_slerp_of_parallel_tensors_is_a_straight_line(inputs):
    double = {name: 2 * value for name, value in inputs[0].items()}
    check("slerp", inputs, lambda n, b, m: 1.3 * b, models=[inputs[0], double], t=0.3)


def test_slerp_of_a_model_with_itself_gives_it_at_any_tolerance(inputs):
    check("slerp", inputs, lambda n, b, m: b, models=[inputs[0]] * 2, t=0.3, tolerance=0.0)


def test_the_tolerance_of_slerp_tells_what_is_parallel(inputs):
    line = lambda n, b, m: 0.7 * m[0] + 0.3 * m[1]
    check("slerp", inputs, line, models=inputs[1][:2], t=0.3, tolerance=0.5)


def test_model_stock_goes_towards_the_base_by_the_angle(inputs):
    def formula(name, base, models):
        deltas = [(m - base).ravel() for m in models]
        cosines = [
            a @ c / (np.linalg.norm(a) * np.linalg.norm(c))
            for a, c in itertools.combinations(deltas, 2)
        ]
        c, count = np.mean(cosines), len(models)
        ratio = count * c / (1 + (count - 1) * c)
        return ratio * np.mean(models, axis=0) + (1 - ratio) * base

    close = [{n: v + 0.3 for n, v in model.items()} for model in inputs[1]]
    check("model_stock", inputs, formula, models=close)


def keep_largest(values, density):
    """Zeroes all but the `int(density n)` largest magnitudes; the first of equal ones stay."""
    flat = values.ravel().copy()
    order = np.argsort(-np.abs(flat), kind="stable")
    flat[order[int(density * flat.size) :]] = 0
    return flat.reshape(values.shape)


def elect(deltas, weights, tie, normalize):
    total = sum(w * d for w, d in pairs(weights, deltas))
    sign = np.where(total == 0, tie, np.sign(total))
    agrees = [(np.sign(d) == sign) & (d != 0) for d in deltas]
    merged = sum(w * np.where(a, d, 0) for w, a, d in pairs(weights, agrees, deltas))
    divisor = sum(w * a for w, a in pairs(weights, agrees))
    return merged / np.where(divisor == 0, 1, divisor) if normalize else merged


@pytest.mark.parametrize(
    ("density", "normalize"), [(0.0, True), (0.2, True), (0.5, False), (1.0, True)]
)
def test_ties_trims_over_all_tensors_together(inputs, density, normalize):
    base, models = inputs
    names = list(base)
    kept = [
        keep_largest(np.concatenate([(m[n] - base[n]).ravel() for n in names]), density)
        for m in models
    ]
    sums = sum(w * d for w, d in pairs(W, kept))
    tie = 1 if np.sign(sums).sum() > 0 else -1
    merged = elect(kept, W, tie, normalize)
    starts = dict(pairs(names, np.cumsum([0, *(base[n].size for n in names[:-1])])))

    def formula(name, b, m):
        part = merged[starts[name] : starts[name] + b.size]
        return b + 0.7 * part.reshape(b.shape)

    check("ties", inputs, formula, W, density=density, normalize=normalize, scale=0.7)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_per_tensor_trims_each_tensor(inputs, density):
    def formula(name, b, m):
        return b + elect([keep_largest(x - b, density) for x in m], np.ones(3), 1, True)

    check("ties_per_tensor", inputs, formula, density=density)


@pytest.mark.parametrize(("name", "more"), [("ties", -1), ("ties", 1), ("ties_per_tensor", 1)])
def test_opposed_equal_entries_take_the_sign_of_the_majority_or_plus(name, more):
    # Integers, so that the differences from the base are exact and cancel exactly.
    base = {"w": np.asarray([3.0, 5.0, 7.0])}
    deltas = [np.asarray([2.0, more, more]), np.asarray([-2.0, more, more])]
    models = [{"w": base["w"] + delta} for delta in deltas]
    sign = 1 if name == "ties_per_tensor" else more
    formula = lambda n, b, m: b + np.asarray([2.0 * sign, more, more])
    check(name, (base, models), formula, density=1.0)


def test_without_a_majority_the_sign_is_minus():
    base = {"w": np.asarray([3.0, 5.0, 7.0])}
    models = [{"w": base["w"] + np.asarray([d, 1.0, -1.0])} for d in (2.0, -2.0)]
    formula = lambda n, b, m: b + np.asarray([-2.0, 1.0, -1.0])
    check("ties", (base, models), formula, density=1.0)


def test_of_equal_magnitudes_the_first_stay():
    base = {"a": np.zeros(3), "b": np.zeros(4)}
    model = {"a": np.asarray([1.0, -2.0, 1.0]), "b": np.asarray([1.0, -1.0, 1.0, 3.0])}
    kept = {"a": [1.0, -2.0, 1.0], "b": [0.0, 0.0, 0.0, 3.0]}
    check("ties", (base, [model]), lambda n, b, m: np.asarray(kept[n]), density=4 / 7 + 1e-9)


def test_iso_c_makes_singular_values_equal(inputs):
    def formula(name, b, m):
        total = sum(w * (x - b) for w, x in pairs(W, m))
        if b.ndim == 1:
            return b + 1.2 * total / W.sum()
        left, values, right = np.linalg.svd(total, full_matrices=False)
        return b + 1.2 * values.mean() * left @ right

    check("iso_c", inputs, formula, W, scale=1.2)


def test_dare_is_its_formula_with_the_bits_of_jax_random(inputs):
    from lamina.platform.merging.random import tensor_keys

    def kept(name, number, shape):
        words = tensor_keys(7, [name], number + 1)[0, number]
        bits = jax.random.bits(jax.random.wrap_key_data(words), shape, "uint32")
        return np.asarray(bits) < round(0.4 * 2**32)

    def dare(name, b, m):
        masks = [kept(name, number, b.shape) for number in range(len(m))]
        return b + sum(w * k * (x - b) / 0.4 for w, k, x in pairs(W, masks, m))

    def dare_l1(name, b, m):
        total = b.copy()
        for number, (w, x) in enumerate(pairs(W, m)):
            left = kept(name, number, b.shape) * (x - b)
            total += w * left * np.abs(x - b).sum() / np.abs(left).sum()
        return total

    check("dare", inputs, dare, W, density=0.4, seed=7)
    check("dare_l1", inputs, dare_l1, W, density=0.4, seed=7)
