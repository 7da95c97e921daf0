"""Streaming LDA against its recursion, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.models.spec import Output
from lamina.platform.errors import UserError
from lamina.platform.incremental.learners import create
from lamina.platform.incremental.learners.slda import updated
from lamina.platform.training.learners import Setup

ROWS, SIZE, CLASSES = 40, 5, 3


def by_rows(x, labels, there):
    mean, count = np.zeros((CLASSES, SIZE)), np.zeros(CLASSES)
    covariance, t = np.zeros((SIZE, SIZE)), 0
    for row, label, counts in zip(x, labels, there, strict=True):
        if counts:
            gap = row - mean[label]
            covariance = (t * covariance + t / (t + 1) * np.outer(gap, gap)) / (t + 1)
            mean[label] += gap / (count[label] + 1)
            count[label], t = count[label] + 1, t + 1
    return {"mean": mean, "count": count, "covariance": covariance}


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    labels, there = rng.integers(0, CLASSES, ROWS), rng.uniform(size=ROWS) > 0.2
    return rng.normal(size=(ROWS, SIZE)) + labels[:, None], labels, there


def by_batches(x, labels, there, sizes):
    own = {
        "mean": jnp.zeros((CLASSES, SIZE)),
        "count": jnp.zeros(CLASSES),
        "covariance": jnp.zeros((SIZE, SIZE)),
    }
    cuts = np.cumsum(sizes)[:-1]
    for part in zip(*(np.split(a, cuts) for a in (x, labels, there)), strict=True):
        own = jax.jit(updated)(own, *map(jnp.asarray, part))
    return own


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [(40,), (10, 30)])
def test_batches_give_what_rows_one_by_one_give(sizes):
    expected, found = by_rows(*drawn()), by_batches(*drawn(), sizes)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.usefixtures("x64")
def test_means_do_not_depend_on_the_order():
    x, labels, there = drawn()
    order = np.random.default_rng(1).permutation(ROWS)
    one = by_batches(x, labels, there, (40,))
    other = by_batches(x[order], labels[order], there[order], (40,))
    np.testing.assert_allclose(one["mean"], other["mean"], rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_scores_are_those_of_linear_discriminants_and_what_never_came_is_never_answered():
    learner = create("slda", shrinkage=0.01)
    own = by_batches(*drawn(), (40,)) | {"shrinkage": jnp.asarray(0.01)}
    x = drawn(2)[0]
    found = learner.predict(own, Output(jnp.zeros((ROWS, CLASSES)), jnp.asarray(x)), None)
    statistics = by_rows(*drawn())
    inverse = np.linalg.inv(0.99 * statistics["covariance"] + 0.01 * np.eye(SIZE))
    weights = inverse @ statistics["mean"].T
    bias = -0.5 * (statistics["mean"] * weights.T).sum(-1)
    np.testing.assert_allclose(found, x @ weights + bias, rtol=1e-9)
    own["count"] = own["count"].at[1].set(0.0)
    scores = learner.predict(own, Output(jnp.zeros((ROWS, CLASSES)), jnp.asarray(x)), None)
    assert not (np.argmax(scores, -1) == 1).any()


def test_a_model_that_tells_no_features_is_refused(case):
    learner = create("slda")
    blind = lambda params, batch: Output(case.forward(params, batch).logits)
    batch = jax.eval_shape(lambda: case.mixed().batch)
    with pytest.raises(UserError, match="one vector of features"):
        learner.init(Setup(case.params, blind, batch, case.space, jax.random.key(0)))
