"""Single steps of learners beside Avalanche's, and where our conventions differ.

The numbers are those of `tests/references/avalanche_formulas.py`, on a linear model in float64.
"""

import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lamina.models.prompts import PromptPool
from lamina.models.spec import Output
from lamina.platform.incremental import metrics
from lamina.platform.incremental.learners import agem, create, gem, lwf
from lamina.platform.incremental.learners.features import unit
from lamina.platform.incremental.learners.icarl import herded
from lamina.platform.training.learners import Mixed, Moment, Setup, Space
from lamina.platform.training.state import TrainState

pytestmark = pytest.mark.usefixtures("x64")

REFERENCES = Path(__file__).parents[2] / "references"


def numbers(*path):
    found = json.loads((REFERENCES / "avalanche_formulas.json").read_text())
    for name in path:
        found = found[name]
    return types.SimpleNamespace(
        **{k: np.asarray(v) if isinstance(v, list) else v for k, v in found.items()}
    )


def forward(params, batch):
    return Output(batch["inputs"] @ params["kernel"], batch["inputs"])


def moment(experience=1, now=(0, 1, 2, 3)):
    hot = jnp.isin(jnp.arange(4), jnp.asarray(now))
    seen = jnp.ones(4, bool)
    return Moment(jnp.int32(experience), seen, hot, jnp.int32(0), jax.random.key(0))


def mixed(groups=None, **arrays):
    batch = {name: jnp.asarray(array) for name, array in arrays.items()}
    count = len(batch["labels"])
    batch = {"weights": jnp.ones(count), "there": jnp.ones(count, bool)} | batch
    return Mixed(batch, groups or {"stream": slice(0, count)})


def own_of(learner, kernel, batch):
    params, space = {"kernel": jnp.asarray(kernel)}, Space(2, 4, 2, 2, len(batch.batch["labels"]))
    example = jax.eval_shape(lambda: batch.batch)
    own = learner.init(Setup(params, forward, example, space, jax.random.key(0)))
    return own | {name: jnp.asarray(value) for name, value in learner.hyper.items()}


def test_lwf_has_the_gradient_of_avalanche_without_its_factor():
    n = numbers("lwf")
    classes = jnp.isin(jnp.arange(4), n.classes)
    of = lambda z: lwf.distillation(jnp.asarray(n.teacher), z, classes, n.temperature).mean()
    np.testing.assert_allclose(jax.grad(of)(jnp.asarray(n.student)), n.gradient, atol=1e-12)


@pytest.mark.parametrize("number", [0, 1])
def test_gem_projects_as_avalanche_does(number):
    n = numbers("gem", number)
    gram, dots = n.past @ n.past.T + 1e-3 * np.eye(3), n.past @ n.g
    assert dots.min() < 0
    there = jnp.ones(3, bool)
    v = gem.dual(jnp.asarray(gram), jnp.asarray(dots), there, jnp.asarray(n.strength))
    np.testing.assert_allclose(n.g + np.asarray(v) @ n.past, n.projected, rtol=1e-5, atol=1e-6)


def test_agem_projects_as_avalanche_does():
    n = numbers("agem")
    found = agem.projected({"a": jnp.asarray(n.g)}, {"a": jnp.asarray(n.reference)})["a"]
    np.testing.assert_allclose(found, n.projected, rtol=1e-6)


@pytest.mark.parametrize("number", range(4))  # separate and online, batches of 1 and of 3
def test_ewc_is_that_of_avalanche_with_its_fisher_and_twice_its_strength(number):
    """Avalanche has no factor 1/2, and squares the gradient of a batch's mean.

    With batches of one row that is our "empirical" Fisher, with larger ones our "batch".
    """
    n = numbers("ewc", number)
    keys = {"fisher": "empirical" if n.batch == 1 else "batch", "mode": n.mode}
    learner = create("ewc", strength=2 * n.strength, decay=n.decay, batches=0, **keys)
    own = own_of(learner, n.anchors[0], mixed(inputs=n.x[0], labels=n.labels[0]))
    for anchor, x, labels, expected in zip(n.anchors, n.x, n.labels, n.importances, strict=True):
        params, before = {"kernel": jnp.asarray(anchor)}, own["importance"]["kernel"]
        carry = learner.sweep.start(own, params, moment())
        for first in (0, 3):
            part = slice(first, first + 3)
            batch = mixed(inputs=x[part], labels=labels[part])
            carry = learner.sweep.add(carry, own, params, batch, forward, moment())
        own = learner.sweep.finish(carry, own, params, moment())
        kept = before if n.mode == "separate" else 0.0
        np.testing.assert_allclose(own["importance"]["kernel"] - kept, expected, rtol=1e-10)

    def penalty(params):
        return learner.loss(jnp.zeros(()), own, params, None, None, moment(), forward)

    value, gradient = jax.value_and_grad(penalty)({"kernel": jnp.asarray(n.params)})
    np.testing.assert_allclose(value, n.penalty, rtol=1e-6)
    np.testing.assert_allclose(gradient["kernel"], n.gradient, rtol=1e-6)


def test_si_is_that_of_avalanche_but_for_the_gradient_of_its_penalty_and_half_the_strength():
    """Avalanche's factor is lambda / 2, and its path has the gradient of the penalty in it.

    It also cuts importances above 1e-3, here it didn't. Without a penalty, in the first experience,
    both are the same; in the second ours has the loss of the task alone, as in the paper.
    """
    n = numbers("si")
    learner = create("si", strength=n.strength / 2, damping=n.damping)
    own = own_of(learner, n.start, mixed(inputs=n.x[0], labels=n.labels[0]))
    state = lambda kernel: types.SimpleNamespace(params={"kernel": kernel})
    kernel = jnp.asarray(n.start)
    for number, (x, labels) in enumerate(zip(n.x, n.labels, strict=True)):
        batch, of_penalty = mixed(inputs=x, labels=labels), 0.0

        def loss(params, batch=batch, own=own, task=1.0):
            log_p = jax.nn.log_softmax(forward(params, batch.batch).logits)
            cross = -jnp.take_along_axis(log_p, batch.batch["labels"][:, None], -1).mean()
            return learner.loss(task * cross, own, params, batch, None, moment(), forward)

        for _ in range(4):
            gradient = jax.grad(loss)({"kernel": kernel})
            of_penalty += jax.grad(loss)({"kernel": kernel}, task=0.0)["kernel"] * (
                -n.rate * gradient["kernel"]
            )
            new = kernel - n.rate * gradient["kernel"]
            own, _ = learner.after(own, state(kernel), state(new), gradient, batch, None, None)
            kernel = new
        np.testing.assert_allclose(kernel, n.ends[number], rtol=1e-10)
        path, before = own["path"]["kernel"], own["importance"]["kernel"]
        # Theirs has the opposite sign until the end of an experience.
        np.testing.assert_allclose(-path + of_penalty, n.paths[number], rtol=1e-8, atol=1e-12)
        own, _ = learner.end(own, state(kernel), moment())
        if number == 0:
            importance = n.importances[0]
            np.testing.assert_allclose(own["importance"]["kernel"], importance, rtol=1e-9)
    share = (own["importance"]["kernel"] - before) / path
    theirs = (n.importances[1] - n.importances[0]) / -n.paths[1]
    np.testing.assert_allclose(share, theirs, rtol=1e-8)
    own["importance"] = {"kernel": jnp.asarray(n.importances[1])}
    params = {"kernel": jnp.asarray(n.params)}
    penalty = learner.loss(jnp.zeros(()), own, params, None, None, moment(), forward)
    np.testing.assert_allclose(penalty, n.penalty, rtol=1e-10)


@pytest.mark.parametrize("number", [0, 1])
def test_der_and_derpp_have_the_loss_of_avalanche_where_both_draws_are_the_same_rows(number):
    """Avalanche takes one draw for the logits and the labels; the paper and we take two."""
    n = numbers("der", number)
    name, keys = ("derpp", {"beta": n.beta}) if n.beta else ("der", {})
    learner = create(name, alpha=n.alpha, **keys)
    names = ["stream", *learner.memory.draws]
    groups = {name: slice(6 * place, 6 * place + 6) for place, name in enumerate(names)}
    draws = len(learner.memory.draws)
    batch = mixed(
        groups,
        inputs=np.concatenate([n.x] + [n.x_memory] * draws),
        labels=np.concatenate([n.labels] + [n.labels_memory] * draws),
        logits=np.concatenate([np.zeros((6, 4))] + [n.logits_memory] * draws),
    )
    own = own_of(learner, n.weights, batch)

    def loss(params):
        output = forward(params, batch.batch)
        log_p = jax.nn.log_softmax(output.logits[:6])
        cross = -jnp.take_along_axis(log_p, jnp.asarray(n.labels)[:, None], -1).mean()
        return learner.loss(cross, own, params, batch, output, moment(), forward)

    value, gradient = jax.value_and_grad(loss)({"kernel": jnp.asarray(n.weights)})
    np.testing.assert_allclose(value, n.loss, rtol=1e-10)
    np.testing.assert_allclose(gradient["kernel"], n.gradient, rtol=1e-9, atol=1e-12)


def test_icarl_has_the_loss_of_avalanche_times_the_number_of_classes():
    """Avalanche means over rows and classes; the paper and we sum over classes."""
    n = numbers("icarl_loss")
    learner = create("icarl")
    batch = mixed(inputs=np.zeros((6, 3)), labels=n.labels)
    own = own_of(learner, np.zeros((3, 4)), batch)
    own["old"] = jnp.isin(jnp.arange(4), jnp.asarray(n.old))
    teacher = lambda params, rows: Output(jnp.asarray(n.teacher))

    def loss(logits):
        return learner.loss(None, own, None, batch, Output(logits), moment(now=(1, 3)), teacher)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(n.student))
    np.testing.assert_allclose(value, 4 * n.loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, 4 * n.gradient, rtol=1e-5, atol=1e-7)


def test_icarl_herds_and_answers_as_avalanche_does():
    n = numbers("icarl_exemplars")
    there, labels = jnp.ones(12, bool), jnp.zeros(12, int)
    rank = herded(unit(jnp.asarray(n.features)), labels, there, 1, jnp.int32(12))
    np.testing.assert_array_equal(np.argsort(rank), n.order)
    learner = create("icarl")
    rows = {"inputs": jnp.asarray(n.features[:9]), "labels": jnp.asarray([0] * 4 + [1] * 5)}
    same = lambda params, batch: Output(batch["inputs"], batch["inputs"])
    own = {"mean": jnp.zeros((4, 5)), "old": jnp.zeros(4, bool)}
    own = learner.review(own, None, rows, jnp.ones(9, bool), same, None)
    np.testing.assert_allclose(own["mean"][:2], n.means, rtol=1e-10)
    answers = learner.predict(own, Output(jnp.zeros((8, 4)), jnp.asarray(n.asked)), None)
    np.testing.assert_array_equal(jnp.argmax(answers, -1), n.answers)


def test_slda_has_the_statistics_and_scores_of_avalanche():
    n = numbers("slda")
    learner = create("slda", shrinkage=n.shrinkage)
    whole = mixed(inputs=n.x, labels=n.labels)
    own = own_of(learner, np.zeros((3, 4)), whole)
    state = TrainState(**dict.fromkeys(TrainState.__dataclass_fields__))
    for part in (slice(0, 7), slice(7, 20)):
        batch = mixed(inputs=n.x[part], labels=n.labels[part])
        output = forward({"kernel": jnp.zeros((3, 4))}, batch.batch)
        own, _ = learner.after(own, state, state, None, batch, output, None)
    np.testing.assert_array_equal(own["count"], n.count)
    np.testing.assert_allclose(own["mean"], n.mean, rtol=1e-10)
    np.testing.assert_allclose(own["covariance"], n.covariance, rtol=1e-10)
    scores = learner.predict(own, Output(jnp.zeros((5, 4)), jnp.asarray(n.asked)), None)
    np.testing.assert_allclose(scores, n.scores, rtol=1e-8)


def test_a_pool_gives_the_prompts_of_avalanche():
    n = numbers("l2p")
    pool = PromptPool(nnx.Rngs(0), 5, 2, 2, 3, jnp.float64)
    pool.prompts[...] = jnp.asarray(n.prompts, jnp.float32)
    pool.keys[...] = jnp.asarray(n.keys, jnp.float32)
    tokens, similarity = pool(jnp.asarray(n.queries))
    np.testing.assert_allclose(tokens, n.tokens, rtol=1e-6)
    np.testing.assert_allclose(similarity.mean(), n.similarity, rtol=1e-6)


def test_transfer_is_that_of_avalanche_whose_forgetting_looks_at_the_own_task_alone():
    """Its forgetting is minus the backward transfer; ours is from the best earlier accuracy."""
    n = numbers("metrics")
    np.testing.assert_allclose(metrics.backward_transfer(n.accuracy), n.backward, rtol=1e-12)
    forward_transfer = metrics.forward_transfer(n.accuracy, initial=n.initial)
    np.testing.assert_allclose(forward_transfer, n.forward, rtol=1e-12)
    assert n.forgetting == pytest.approx(-n.backward)
    assert metrics.forgetting(n.accuracy) > n.forgetting
