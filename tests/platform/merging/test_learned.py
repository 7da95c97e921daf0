"""Learned merges: the engine, and AdaMerging on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lamina.platform import merging
from lamina.platform.errors import UserError
from lamina.platform.merging import learned

AXES = {"head": ("embed", "classes"), "stack": ("layers", "embed", "embed")}


@pytest.fixture(autouse=True)
def _promotion():
    """Optax's optimizers promote dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def problem():
    """Three models of a base, unlabelled inputs for 40 steps, and the entropy of two layers."""
    rng = np.random.default_rng(0)
    draw = lambda scale: {
        "head": np.float32(rng.standard_normal((4, 5)) * scale),
        "stack": np.float32(rng.standard_normal((2, 4, 4)) * scale),
    }
    base = draw(0.4)
    models = [jax.tree.map(np.add, base, draw(0.6)) for _ in range(3)]
    batches = np.float32(rng.standard_normal((40, 8, 4)))
    return models, base, batches


def entropy(params, batch, held):
    x = jnp.tanh(jnp.tanh(batch @ params["stack"][0]) @ params["stack"][1])
    return held * learned.entropy(x @ params["head"]).mean()


def create(**keys):
    return merging.create("adamerging", **{"learning_rate": 0.02} | keys)


def test_entropy_is_that_of_the_softmax():
    logits = np.random.default_rng(0).standard_normal((3, 5))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            learned.entropy(logits), -(p * np.log(p)).sum(-1), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["task", "layer"])
def test_without_a_learning_rate_it_is_task_arithmetic(problem, kind):
    models, base, batches = problem
    merger = create(coefficients=kind, learning_rate=0.0)
    weights = (1.0, 0.5, 2.0)
    merged = merger(
        models, base=base, axes=AXES, weights=weights, loss=entropy, batches=batches, held=1.0
    )
    plain = merging.create("task_arithmetic", scale=0.3)(models, base=base, weights=weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), merged, plain)


@pytest.mark.parametrize("kind", ["task", "layer"])
def test_the_entropy_falls_and_coefficients_have_one_number_for_each_part(problem, kind):
    models, base, batches = problem
    batches = np.broadcast_to(batches[:1], batches.shape)
    found = create(coefficients=kind).fit(
        models, base=base, axes=AXES, loss=entropy, batches=batches, held=1.0
    )
    assert found.losses[-1] < found.losses[0] - 0.01
    shapes = {k: v.shape for k, v in found.coefficients.items()}
    assert shapes == ({"all": (3,)} if kind == "task" else {"head": (3,), "stack": (3, 2)})
    assert all(((v >= 0) & (v <= 1)).all() for v in found.coefficients.values())
    merged = np.asarray(base["stack"])
    if kind == "layer":
        for t in range(3):
            factor = np.asarray(found.coefficients["stack"])[t][:, None, None]
            merged = merged + factor * (models[t]["stack"] - base["stack"])
        np.testing.assert_allclose(found.params["stack"], merged, rtol=0, atol=1e-5)


def test_the_first_step_is_adams_on_the_gradient_by_each_coefficient(problem):
    models, base, batches = problem
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(np.float64, tree)
        found = create(coefficients="task").fit(
            wide(models), base=wide(base), loss=entropy, batches=batches[:1], held=1.0
        )

        def value(c):
            merged = {
                k: base[k].astype(np.float64)
                + sum(c[t] * (models[t][k].astype(np.float64) - base[k]) for t in range(3))
                for k in base
            }
            x = np.tanh(np.tanh(batches[0] @ merged["stack"][0]) @ merged["stack"][1])
            logits = x @ merged["head"]
            p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            return -(p * np.log(p)).sum(-1).mean()

        slopes = []
        for t in range(3):
            ahead, behind = np.full(3, 0.3), np.full(3, 0.3)
            ahead[t], behind[t] = 0.3 + 1e-5, 0.3 - 1e-5
            slopes.append((value(ahead) - value(behind)) / 2e-5)
    # Adam's first step is the learning rate against the sign.
    expected = 0.3 - 0.02 * np.sign(slopes)
    np.testing.assert_allclose(found.coefficients["all"], expected, rtol=0, atol=1e-4)


def test_the_engine_finds_the_coefficients_of_a_target():
    directions = jnp.eye(3)
    merge = lambda c: {"w": c @ directions}
    loss = lambda params, batch, held: jnp.square(params["w"] - held).sum() + 0 * batch
    target = jnp.array([0.2, -0.4, 0.9])
    found = jax.jit(
        lambda batches: learned.learn(merge, jnp.zeros(3), loss, batches, target, optax.adam(0.05))
    )(jnp.zeros(300))
    np.testing.assert_allclose(found.params["w"], target, atol=1e-3)


def test_what_is_missing_is_the_users_mistake(problem):
    models, base, batches = problem
    with pytest.raises(UserError, match="needs a base"):
        create()(models, loss=entropy, batches=batches)
    with pytest.raises(UserError, match="loss="):
        create()(models, base=base)
    with pytest.raises(UserError, match="coefficients"):
        create(coefficients="tensor")
