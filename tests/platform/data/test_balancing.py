"""Rows of packed documents go to ranks of equal work, and stay the same batches."""

import numpy as np
import pytest

from lamina.platform.data import balancing, feed, packing
from lamina.platform.data.dataset import ArraySource
from lamina.platform.errors import UserError

CONTEXT, BATCH, LINEAR = 64, 16, 20.0


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.5, 1.2, 300), 1, CONTEXT - 1).astype(int)
    documents = [np.full(n, 1 + i % 200) for i, n in enumerate(lengths)]
    return ArraySource(packing.pack(documents, CONTEXT, separator=0))


def test_costs_are_those_of_the_documents():
    segments = np.array([[1, 1, 1, 2, 0], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(
        balancing.row_costs(segments, linear=10.0), [30 + 9 + 10 + 1, 50 + 25]
    )


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_get_equal_counts_and_nearly_equal_work(ranks):
    costs = np.random.default_rng(ranks).lognormal(0, 1.5, 64)
    chosen = balancing.balance(costs, ranks)
    assert sorted(chosen) == list(range(64))
    np.testing.assert_array_equal(chosen, balancing.balance(costs, ranks))
    balanced = balancing.step_time(costs[chosen], ranks)
    assert balanced <= balancing.step_time(costs, ranks)
    # Graham's bound, plus a row for the equal counts.
    assert balanced <= costs.sum() / ranks + 2 * costs.max()


def test_rows_that_cannot_be_split_evenly_are_refused():
    with pytest.raises(ValueError, match="7 rows can't be split evenly over 2 ranks"):
        balancing.balance([1.0] * 7, 2)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (4, 1), (2, 4)])
def test_a_balanced_order_keeps_the_batches_and_evens_out_every_part(rows, ranks, accumulation):
    balanced = balancing.BalancedRows(rows, BATCH, ranks, accumulation, LINEAR)
    costs = balancing.row_costs(rows.arrays["segments"], linear=LINEAR)
    opened = [feed.device_feed(source, BATCH, 3) for source in (rows, balanced)]
    plain, chosen = (one.read(5, 20) for one in opened)
    np.testing.assert_array_equal(np.sort(plain, 1), np.sort(chosen, 1))

    def spread(batches):
        # Part i of a rank takes its rows i, i + parts, ...
        shape = (len(batches), ranks, BATCH // ranks // accumulation, accumulation)
        each = costs[batches].reshape(shape).sum(2)
        return (each.max((1, 2)) - each.mean((1, 2))).mean()

    assert spread(chosen) <= spread(plain)
    if ranks > 1:
        assert spread(chosen) < 0.5 * spread(plain)


def test_processes_read_their_parts_of_the_same_balanced_batches(rows):
    balanced = balancing.BalancedRows(rows, BATCH, 4, 1, LINEAR)
    whole = feed.device_feed(balanced, BATCH, 3).read(0, 4)
    halves = [
        feed.device_feed(balanced, BATCH, 3, process_index=i, process_count=2).read(0, 4)
        for i in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(halves, 1), whole)
    grain = feed.grain_feed(balanced, BATCH, 3)
    np.testing.assert_array_equal(
        grain.read(0, 4)["inputs"], rows.gather(rows.arrays, whole)["inputs"]
    )
    grain.close()


def test_rows_without_segments_are_refused():
    with pytest.raises(UserError, match=r"balance_length = 20 is for packed documents"):
        balancing.BalancedRows(ArraySource({"inputs": np.zeros((4, 2))}), 2, 2, 1, LINEAR)
