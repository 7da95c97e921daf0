"""A linear model and the pieces of a step, for formulas in float64."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.models.spec import Output
from lamina.platform.training.learners import Mixed, Moment, Setup, Space

SPACE = Space(experiences=3, classes=4, tasks=3, points=3, rows=8)
BATCH, SIZE, CLASSES = 6, 3, 4


def forward(params, batch):
    return Output(batch["inputs"] @ params["kernel"], batch["inputs"])


def moment(experience=1, now=(0, 1), seen=(0, 1), key=0):
    hot = lambda chosen: jnp.isin(jnp.arange(CLASSES), jnp.asarray(chosen))
    return Moment(jnp.int32(experience), hot(seen), hot(now), jnp.int32(0), jax.random.key(key))


@pytest.fixture
def case():
    """Numbers of one seed, and functions that call hooks with them."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(BATCH, SIZE)), rng.normal(size=(SIZE, CLASSES))
    labels = np.array([0, 1, 2, 3, 0, 1])

    def mixed(groups=None, **arrays):
        batch = {
            "inputs": jnp.asarray(x),
            "labels": jnp.asarray(labels),
            "weights": jnp.ones(BATCH),
            "there": jnp.ones(BATCH, bool),
        }
        return Mixed(batch | arrays, groups or {"stream": slice(0, BATCH)})

    params = {"kernel": jnp.asarray(kernel)}

    def own(learner):
        batch = jax.eval_shape(lambda: mixed().batch)
        start = learner.init(Setup(params, forward, batch, SPACE, jax.random.key(0)))
        return start | {name: jnp.asarray(value) for name, value in learner.hyper.items()}

    def loss(learner, own, batch=None, start=0.0, at=None, params=params):
        batch = batch or mixed()
        output = forward(params, batch.batch)
        moment_ = at or moment()
        return learner.loss(jnp.asarray(start), own, params, batch, output, moment_, forward)

    return types.SimpleNamespace(
        rng=rng,
        space=SPACE,
        x=x,
        kernel=kernel,
        labels=labels,
        mixed=mixed,
        params=params,
        own=own,
        loss=loss,
        moment=moment,
        forward=forward,
    )
