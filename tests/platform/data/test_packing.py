"""Packing loses no token and changes no loss; balancing evens out the ranks' work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lamina.models.spec import DataSpec
from lamina.models.transformer import transformer
from lamina.platform.data import packing

LENGTHS = [3, 1, 14, 7, 30, 2, 2, 9]
CONTEXT = 16


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 20, n).astype(np.int32) for n in LENGTHS]


def test_every_token_is_predicted_once_and_no_row_is_too_long():
    packed = packing.pack(documents(), CONTEXT, separator=0)
    used = packed["segments"] > 0
    assert packed["inputs"].shape[1] == CONTEXT
    expected = np.concatenate([np.append(document, 0) for document in documents()])
    assert sorted(packed["labels"][used]) == sorted(expected)
    assert packed["weights"].sum() == len(expected)
    for row in range(len(used)):
        for segment in range(1, packed["segments"][row].max() + 1):
            place = np.flatnonzero(packed["segments"][row] == segment)
            assert (np.diff(place) == 1).all()
            np.testing.assert_array_equal(packed["positions"][row, place], np.arange(len(place)))


def test_the_packed_loss_is_the_unpacked_loss():
    spec = DataSpec((CONTEXT,), "int32", 20)
    model = transformer(nnx.Rngs(0), spec, jnp.float32, depth=2, embed=16, heads=2)
    model.eval()

    def losses(batch):
        logits = model(
            batch["inputs"], segments=batch["segments"], positions=batch["positions"]
        ).logits
        logprobs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(logprobs, batch["labels"][..., None], -1)[..., 0]
        return -(picked * batch["weights"]).sum()

    whole = packing.pack(documents(), CONTEXT, separator=0)
    alone = [packing.pack([document], CONTEXT, separator=0) for document in documents()]
    np.testing.assert_allclose(losses(whole), sum(losses(batch) for batch in alone), rtol=1e-5)


def test_costs_are_those_of_the_documents():
    segments = np.array([[1, 1, 1, 2, 0], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(
        packing.row_costs(segments, linear=10.0), [30 + 9 + 10 + 1, 50 + 25]
    )


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_get_equal_counts_and_nearly_equal_work(ranks):
    costs = np.random.default_rng(ranks).lognormal(0, 1.5, 64)
    chosen = packing.balance(costs, ranks)
    assert sorted(chosen) == list(range(64))
    np.testing.assert_array_equal(chosen, packing.balance(costs, ranks))
    balanced = packing.step_time(costs[chosen], ranks)
    assert balanced <= packing.step_time(costs, ranks)
    # Graham's bound, plus a row for the equal counts.
    assert balanced <= costs.sum() / ranks + 2 * costs.max()


def test_rows_that_cannot_be_split_evenly_are_refused():
    with pytest.raises(ValueError, match="7 rows can't be split evenly over 2 ranks"):
        packing.balance([1.0] * 7, 2)
