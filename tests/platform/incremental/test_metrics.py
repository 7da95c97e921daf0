"""The metrics against numbers worked out by hand."""

import numpy as np
import pytest

from lamina.platform.incremental import metrics

R = np.array([[0.9, 0.2, 0.1], [0.5, 0.8, 0.3], [0.7, 0.4, 0.6]])


def test_every_metric_of_a_small_matrix():
    expected = {
        "final_average_accuracy": (0.7 + 0.4 + 0.6) / 3,
        "average_incremental_accuracy": (0.9 + 1.3 / 2 + 1.7 / 3) / 3,
        "forgetting": ((0.9 - 0.7) + (0.8 - 0.4)) / 2,
        "backward_transfer": ((0.7 - 0.9) + (0.4 - 0.8)) / 2,
        "forward_transfer": (0.2 + 0.3) / 2,
        "intransigence": (0.1 + 0.2 + 0.4) / 3,
        "minimum_accuracy": (0.5 + 0.4) / 2,
    }
    assert {name: pytest.approx(float(f(R))) for name, f in metrics.METRICS.items()} == expected


def test_seeds_stand_in_front():
    both = np.stack([R, 1 - R])
    for function in metrics.METRICS.values():
        assert function(both).shape == (2,)
        np.testing.assert_allclose(function(both)[0], function(R))


def test_a_finer_grid_changes_only_the_minimum():
    fine = np.stack([R[0] - 0.2, R[0], R[1] - 0.3, R[1], R[2] - 0.1, R[2]])
    for name, function in metrics.METRICS.items():
        value = function(fine, ends=[1, 3, 5])
        expected = (0.2 + 0.3) / 2 if name == "minimum_accuracy" else function(R)
        np.testing.assert_allclose(value, expected, err_msg=name)


def test_forgetting_looks_at_all_earlier_times_unless_told():
    early = np.array([[0.5, 0.9, 0.0], [0.5, 0.6, 0.0], [0.5, 0.6, 0.9]])
    assert float(metrics.forgetting(early)) == pytest.approx(0.15)
    assert float(metrics.forgetting(early, from_own_task=True)) == pytest.approx(0.0)


def test_a_task_that_gained_is_negative_forgetting():
    assert float(metrics.forgetting([[0.4, 0.0], [0.6, 0.5]])) == pytest.approx(-0.2)


def test_forward_transfer_and_intransigence_with_their_references():
    initial, joint = np.array([0.1, 0.1, 0.2]), np.array([0.95, 0.9, 0.7])
    assert float(metrics.forward_transfer(R, initial=initial)) == pytest.approx(0.1)
    assert float(metrics.intransigence(R, reference=joint)) == pytest.approx(0.25 / 3)


def test_one_experience_forgets_nothing():
    one = np.array([[[0.8]]])
    assert metrics.forgetting(one) == metrics.backward_transfer(one) == 0
    assert metrics.final_average_accuracy(one) == metrics.minimum_accuracy(one) == 0.8


def test_a_tensor_that_is_not_square_needs_its_ends():
    with pytest.raises(ValueError, match="4 times and 3 tasks"):
        metrics.forgetting(np.zeros((4, 3)))


@pytest.mark.parametrize("ends", [[0, 2, 1], [1, 1, 2], [1, 2, 4], [-5, 1, 2]])
def test_ends_are_rows_in_order(ends):
    with pytest.raises(ValueError, match="should be increasing rows of the 4 times"):
        metrics.minimum_accuracy(np.zeros((4, 3)), ends)


def test_ends_may_be_counted_from_the_last():
    fine = np.random.default_rng(0).random((6, 3))
    for function in metrics.METRICS.values():
        np.testing.assert_array_equal(function(fine, [-5, -3, -1]), function(fine, [1, 3, 5]))


def test_tasks_need_not_be_evaluated_before_they_come():
    late = np.where(np.tri(3, dtype=bool), R, np.nan)
    for name, function in metrics.METRICS.items():
        expected = np.nan if name == "forward_transfer" else function(R)
        np.testing.assert_allclose(function(late), expected, err_msg=name)
    lost = np.array(R)
    lost[1, 0] = np.nan  # an accuracy after the task has come isn't left out
    assert np.isnan(metrics.forgetting(lost))
    assert np.isnan(metrics.average_incremental_accuracy(lost))
