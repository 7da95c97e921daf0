"""Merges at the end of experiences: averages of models, sums of task vectors."""

import jax.numpy as jnp
import numpy as np
import pytest

from lamina.platform.errors import UserError
from lamina.platform.incremental.learners import create
from lamina.platform.training.state import TrainState

pytestmark = pytest.mark.usefixtures("x64")


def states(case, count):
    kernels = [case.rng.normal(size=case.kernel.shape) for _ in range(count)]
    rest = {name: None for name in TrainState.__dataclass_fields__ if name != "params"}
    made = lambda kernel: TrainState(params={"kernel": jnp.asarray(kernel)}, **rest)
    return kernels, [made(kernel) for kernel in kernels]


def test_models_are_averaged_exponentially_from_the_first_experience_on(case):
    learner = create("ema_merge", decay=0.3)
    kernels, fine_tuned = states(case, 3)
    own, expected = case.own(learner), kernels[0]
    for number, state in enumerate(fine_tuned):
        if number:
            expected = 0.3 * expected + 0.7 * kernels[number]
        own, merged = learner.end(own, state, case.moment(number))
        np.testing.assert_allclose(merged.params["kernel"], expected, rtol=1e-10)
    own, again = learner.end(own, merged, case.moment(3))
    np.testing.assert_allclose(again.params["kernel"], expected, rtol=1e-10)  # nothing to average


@pytest.mark.parametrize(("normalize", "start"), [(True, "base"), (False, "last")])
def test_task_vectors_add_up(case, normalize, start):
    learner = create("task_arithmetic", scale=0.8, normalize=normalize, start=start)
    kernels, fine_tuned = states(case, 3)
    own, vectors = case.own(learner), []
    for number, state in enumerate(fine_tuned):
        own, begun = learner.begin(own, state, case.moment(number))
        first = case.kernel if start == "base" or not number else kernels[number - 1]
        np.testing.assert_array_equal(begun.params["kernel"], first)
        own, merged = learner.end(own, state, case.moment(number))
        vectors.append(kernels[number] - case.kernel)
        s = 0.8 / len(vectors) if normalize else 0.8
        np.testing.assert_allclose(
            merged.params["kernel"], case.kernel + s * sum(vectors), rtol=1e-10
        )


def test_one_task_at_scale_one_is_that_fine_tuned_model(case):
    learner = create("task_arithmetic")
    kernels, (state,) = states(case, 1)
    _, merged = learner.end(case.own(learner), state, case.moment(0))
    np.testing.assert_allclose(merged.params["kernel"], kernels[0], rtol=1e-12)


def test_a_decay_that_is_no_fraction_is_refused():
    with pytest.raises(UserError, match=r"learner.decay = 1.5"):
        create("ema_merge", decay=1.5)
