"""iCaRL's loss, herding and nearest means against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.models.spec import Output
from lamina.platform.incremental import memory as memories
from lamina.platform.incremental.learners import create
from lamina.platform.incremental.learners.icarl import herded

pytestmark = pytest.mark.usefixtures("x64")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def herded_by_hand(phi, most):
    """The paper's loop: the next exemplar brings the mean of all chosen nearest to the mean."""
    mean, chosen = phi.mean(0), []
    for k in range(1, min(most, len(phi)) + 1):
        rest = [i for i in range(len(phi)) if i not in chosen]
        gaps = [np.linalg.norm(mean - (phi[i] + phi[chosen].sum(0)) / k) for i in rest]
        chosen.append(rest[int(np.argmin(gaps))])
    return chosen


@pytest.mark.parametrize("most", [1, 4, 9])
def test_herding_picks_as_the_paper_does(most):
    rng = np.random.default_rng(0)
    labels, there = np.array([0, 2, 0, 2, 2, 0, 0, 2, 0, 0]), np.ones(10, bool)
    there[2] = False
    phi = unit(rng.normal(size=(10, 4)))
    rank = herded(*map(jnp.asarray, (phi, labels, there)), 3, jnp.asarray(most))
    for label in (0, 2):
        members = np.flatnonzero((labels == label) & there)
        expected = members[herded_by_hand(phi[members], most)]
        found = members[np.argsort(rank[members], kind="stable")][: len(expected)]
        np.testing.assert_array_equal(found, expected)
    assert rank[2] == most  # padding is never chosen


def test_the_loss_is_a_sum_of_binary_cross_entropies_over_the_classes_seen(case):
    learner, teacher = create("icarl", memory=8), case.rng.normal(size=case.kernel.shape)
    own = case.own(learner) | {
        "teacher": {"kernel": jnp.asarray(teacher)},
        "old": jnp.asarray([True, True, False, False]),
    }
    loss = case.loss(learner, own, at=case.moment(now=(2,), seen=(0, 1, 2)))
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    target = np.eye(4)[case.labels]
    target[:, :2] = sigmoid(case.x @ teacher)[:, :2]
    g = sigmoid(case.x @ case.kernel)
    each = -(target * np.log(g) + (1 - target) * np.log(1 - g))[:, :3].sum(-1)
    np.testing.assert_allclose(loss, each.mean(), rtol=1e-10)


def test_without_old_classes_it_is_one_sigmoid_a_class(case):
    learner = create("icarl", memory=8)
    gradient = jax.grad(
        lambda kernel: case.loss(
            learner,
            case.own(learner),
            at=case.moment(0, now=(0, 1, 2, 3)),
            params={"kernel": kernel},
        )
    )(case.params["kernel"])
    g = 1 / (1 + np.exp(-case.x @ case.kernel))
    np.testing.assert_allclose(gradient, case.x.T @ (g - np.eye(4)[case.labels]) / 6, rtol=1e-9)


def test_a_class_that_comes_again_is_learned_from_its_labels(case):
    learner = create("icarl", memory=8)
    own, at = case.own(learner), case.moment(now=(0, 1, 2, 3), seen=(0, 1, 2, 3))
    first = case.loss(learner, own, at=at)
    assert case.loss(learner, own | {"old": jnp.ones(4, bool)}, at=at) == first


def test_the_mean_of_a_class_is_its_nearest_mean_and_logits_answer_before_there_is_one(case):
    learner = create("icarl", memory=8)
    own, there = case.own(learner), jnp.asarray([True] * 5 + [False])
    answer = case.forward(case.params, case.mixed().batch)
    np.testing.assert_array_equal(learner.predict(own, answer, None), answer.logits)
    own = learner.review(own, case.params, case.mixed().batch, there, case.forward, None)
    phi = unit(case.x)[:5]
    for label in range(4):
        mean = unit(phi[case.labels[:5] == label].mean(0))
        np.testing.assert_allclose(own["mean"][label], mean, rtol=1e-10)
    scores = learner.predict(own, Output(answer.logits[:4], 3.0 * own["mean"]), None)
    np.testing.assert_array_equal(jnp.argmax(scores, -1), np.arange(4))


def test_a_memory_that_shrinks_keeps_the_first_of_each_list(case):
    kept = memories.create(6, policy="balanced", at_end="herded")
    example = {"labels": jax.ShapeDtypeStruct((1,), np.int32)}
    memory = kept.init(case.space, example)
    for number, labels in enumerate(((0, 0, 0, 0), (1, 1, 1, 1))):
        at = case.moment(experience=number)
        rows, ranks = {"labels": jnp.asarray(labels)}, jnp.asarray([2.0, 0.0, 1.0, 3.0]) / 7
        memory = kept.insert(memory, rows, jnp.ones(4, bool), at, ranks)
    for label in (0, 1):
        held = np.asarray(memory["priority"])[np.asarray(memory["rows"]["labels"]) == label]
        np.testing.assert_allclose(np.sort(held), np.arange(3) / 7)
