"""Learners on islands: each island learns its part of the stream, with a memory of its own."""

import jax
import numpy as np
import pytest

from lamina.platform.errors import UserError

OUTER = {"name": "sgd", "learning_rate": 1.0}
ON_ISLANDS = {
    "diloco": {"name": "diloco", "number": 2, "every": 5, "outer": OUTER},
    "demo": {"name": "demo", "number": 2, "topk": 8},
}


@pytest.mark.parametrize("past_only", [False, True])
def test_islands_learn_from_a_stream_each_with_a_memory_of_its_own(learn, past_only):
    result, accuracy = learn("er", islands=ON_ISLANDS["diloco"], learner__past_only=past_only)
    assert accuracy[0, -1].mean() > 0.25
    memory = jax.device_get(result.state.islands["learner"]["memory"])
    assert memory["rows"]["labels"].shape == (2, 64)
    assert not np.array_equal(memory["rows"]["inputs"][0], memory["rows"]["inputs"][1])
    for labels in memory["rows"]["labels"]:
        assert set(labels.tolist()) == set(range(10))  # the last experience's at its end, too
    # Of 64 steps: after every fifth, and at the ends of the experiences, after 22, 44 and 64.
    assert result.summary["communication"]["rounds"] == 12 + 3


@pytest.mark.slow
@pytest.mark.parametrize(("method", "past_only"), [("diloco", True), ("demo", False)])
def test_islands_on_a_mesh_learn_the_same_from_a_stream(method, past_only, learn):
    changes = {"islands": ON_ISLANDS[method], "learner__past_only": past_only}
    one, accuracy = learn("er", "one", **changes)
    mesh = {"data": 4, "replica": 2}
    eight, again = learn("er", "eight", devices=8, mesh=mesh, **changes)
    np.testing.assert_allclose(accuracy, again, atol=0.02)
    close = lambda a, b: np.testing.assert_allclose(
        np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5
    )
    jax.tree.map(close, one.state.params, eight.state.params)
    memories = [run.state.islands["learner"]["memory"] for run in (one, eight)]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), *memories)


def test_a_learner_that_acts_beside_the_steps_is_refused_on_islands(learn):
    with pytest.raises(UserError, match="learner 'lwf' can't learn on islands yet"):
        learn("lwf", islands={"name": "local_sgd", "number": 2})
