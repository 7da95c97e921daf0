"""Barriers on the line between two models, and REPAIR: statistics that match those of the ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.models.functional import functional
from lamina.models.spec import DataSpec
from lamina.models.table import MODELS
from lamina.platform.errors import UserError
from lamina.platform.merging import barrier, repair, symmetries

IMAGES = DataSpec((8, 8, 2), "float32", 5)


def build(name, **options):
    return functional(lambda rngs: MODELS[name](rngs, IMAGES, jnp.float32, **options))


def random_like(tree, seed):
    random = np.random.default_rng(seed)
    draw = lambda leaf: random.standard_normal(leaf.shape) / max(1, leaf[..., 0].size) ** 0.5
    positive = lambda leaf: random.uniform(0.5, 1.5, leaf.shape)
    return jax.tree.map(
        lambda leaf: jnp.asarray((draw if leaf.ndim > 1 else positive)(leaf), jnp.float32),
        jax.tree.map(lambda leaf: np.zeros(leaf.shape), tree),
    )


@pytest.fixture(scope="module")
def inputs():
    return jax.random.uniform(jax.random.key(0), (3, 16, 8, 8, 2), jnp.float32)


def test_the_barrier_is_its_formula_in_float64():
    rng = np.random.default_rng(0)
    alphas, losses = np.linspace(0, 1, 11), rng.uniform(0, 3, 11)
    line = max(
        v - ((1 - a) * losses[0] + a * losses[-1]) for a, v in zip(alphas, losses, strict=True)
    )
    mean = max(v - (losses[0] + losses[-1]) / 2 for v in losses)
    assert barrier.barrier(alphas, losses) == pytest.approx(line, abs=1e-12)
    assert barrier.barrier(alphas, losses, ends="mean") == pytest.approx(mean, abs=1e-12)
    assert barrier.barrier(alphas, -losses, mode="max") == pytest.approx(line, abs=1e-12)


def test_a_convex_loss_has_no_barrier_and_equal_ends_agree():
    alphas = np.linspace(0, 1, 5)
    assert barrier.barrier(alphas, (alphas - 0.3) ** 2) == 0
    bump = alphas * (1 - alphas)
    assert barrier.barrier(alphas, bump) == barrier.barrier(alphas, bump, ends="mean") == 0.25


def test_a_barrier_needs_both_ends():
    with pytest.raises(ValueError, match="the first 0 and the last 1"):
        barrier.barrier([0.1, 1.0], [1.0, 2.0])


def test_the_line_is_evaluated_at_each_place_and_exact_at_its_ends():
    one = {"w": jnp.asarray([0.1, 3.0]), "n": jnp.asarray(7)}
    other = {"w": jnp.asarray([0.7, -1.0]), "n": jnp.asarray(9)}
    evaluate = lambda tree: {"sum": tree["w"].sum(), "n": tree["n"]}
    found = barrier.along(evaluate, one, other, [0.0, 0.25, 1.0])
    first, last = one["w"].sum(), other["w"].sum()
    np.testing.assert_array_equal(found["sum"][[0, 2]], [first, last])
    assert found["sum"][1] == pytest.approx(float(0.75 * first + 0.25 * last), abs=1e-6)
    assert found["n"].tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("name", "options", "alpha"),
    [
        ("mlp", {"widths": (12, 10)}, 0.25),
        ("convnet", {"width": 4, "stages": 2, "norm": "none"}, 0.5),
    ],
)
def test_units_of_a_repaired_model_have_the_mean_of_the_ends_statistics(
    name, options, alpha, inputs
):
    model = build(name, **options)
    one, other = random_like(model.params, 0), random_like(model.params, 1)
    merged = barrier.interpolate(one, other, alpha)
    fixed = repair.repair(model, one, other, merged, inputs, alpha=alpha)
    stats = jax.jit(lambda tree: repair.layer_statistics(model, tree, inputs))
    a, b, now, before = stats(one), stats(other), stats(fixed), stats(merged)
    assert len(now) == 2
    for layer in now:
        for kind in ("mean", "std"):
            x, y = getattr(a[layer], kind), getattr(b[layer], kind)
            wanted = (1 - alpha) * x + alpha * y
            np.testing.assert_allclose(getattr(now[layer], kind), wanted, rtol=2e-3, atol=2e-4)
        assert (before[layer].std < 0.95 * now[layer].std).mean() > 0.5  # averaging took variance


def test_a_model_merged_with_itself_stays(inputs):
    model = build("mlp", widths=(12, 10))
    one = random_like(model.params, 0)
    fixed = repair.repair(model, one, one, one, inputs)
    for a, b in zip(jax.tree.leaves(fixed), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_those_of_the_data(inputs):
    model = build("convnet", width=4, stages=2)
    params = random_like(model.params, 0)
    state = random_like(model.model_state, 1)
    fixed = repair.reset_statistics(model, params, state, inputs)
    first = jax.lax.conv_general_dilated(
        inputs.reshape(-1, 8, 8, 2), params["convolutions"]["0"]["kernel"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    found = fixed["norms"]["0"]
    np.testing.assert_allclose(found["mean"], first.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["var"], first.var((0, 1, 2)), rtol=1e-3)


def test_a_merged_model_with_batch_norm_has_its_statistics_reset(inputs):
    model = build("convnet", width=4, stages=2)
    one, other = (
        symmetries.joined(random_like(model.params, n), random_like(model.model_state, n))
        for n in (0, 1)
    )
    merged = barrier.interpolate(one, other, 0.5)
    fixed = repair.repair(model, one, other, merged, inputs)
    params, state = symmetries.separate(fixed)
    again = repair.reset_statistics(model, params, state, inputs)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_array_equal(params["head"]["kernel"], merged["head"]["kernel"])


def test_a_model_that_cannot_be_repaired_says_so(inputs):
    model = build("convnet", width=8, stages=1, norm="group")
    one = random_like(model.params, 0)
    with pytest.raises(UserError, match="no batch norm, and no layer with a bias"):
        repair.repair(model, one, one, one, inputs)
