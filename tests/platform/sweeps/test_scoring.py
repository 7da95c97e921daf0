"""The score of a shoot-out on numbers that can be checked by hand."""

import math

import numpy as np
import pytest

from lamina.platform.errors import UserError
from lamina.platform.sweeps import scoring


def test_a_target_is_reached_at_the_first_success_and_what_is_not_finite_is_none():
    steps = [1, 2, 3]
    assert scoring.to_target(steps, [2.0, 0.5, 0.1], 0.5, "min") == 2
    assert scoring.to_target(steps, [None, math.nan, 0.1], 0.5, "min") == 3
    assert scoring.to_target(steps, [0.1, 0.2, 0.3], 0.5, "max") == math.inf


def test_a_study_counts_its_fastest_trial_and_the_median_study_decides():
    assert scoring.study_score([[4.0, 2.0], [9.0, 8.0], [6.0, math.inf]]) == 6.0
    assert scoring.study_score([[2.0], [4.0]]) == 3.0
    assert scoring.study_score([[2.0], [math.inf]]) == math.inf


def test_the_integral_is_that_of_the_profile():
    own = [1.0, 1.7, 3.2, math.inf, 5.0]
    tau = np.linspace(1, 4, 300_001)
    area = np.trapezoid(scoring.profile(own, tau), tau) / 3
    assert scoring.integral(own) == pytest.approx(area, abs=1e-5)


def test_the_fastest_everywhere_scores_1_and_who_never_arrives_0():
    times = {
        "a": {"x": 1.0, "y": 10.0},
        "b": {"x": 2.5, "y": math.inf},
        "c": {"x": math.inf, "y": math.inf},
    }
    assert scoring.scores(times) == {"a": 1.0, "b": 0.25, "c": 0.0}


def test_a_workload_that_nobody_solves_counts_against_all():
    times = {"a": {"x": 1.0, "y": math.inf}, "b": {"x": 1.0, "y": math.inf}}
    assert scoring.scores(times) == {"a": 0.5, "b": 0.5}


def test_scores_do_not_depend_on_the_unit_of_time():
    times = {"a": {"x": 3.0, "y": 4.0}, "b": {"x": 5.0, "y": 2.0}}
    scaled = {name: {w: 60 * t for w, t in own.items()} for name, own in times.items()}
    assert scoring.scores(times) == pytest.approx(scoring.scores(scaled))


def test_what_is_not_a_number_is_a_miss_wherever_it_stands():
    missed, nan = math.inf, math.nan
    assert scoring.study_score([[nan, 4.0], [4.0, nan], [nan, nan]]) == 4.0
    times = {"a": {"x": nan}, "b": {"x": 2.0}, "c": {"x": 4.0}}
    assert scoring.ratios(times) == {"a": {"x": missed}, "b": {"x": 1.0}, "c": {"x": 2.0}}
    assert scoring.scores(dict(reversed(times.items()))) == scoring.scores(times)
    assert scoring.bootstrap([nan, nan]) == (missed, missed)


def test_ties_share_the_best_score_and_no_time_at_all_is_the_fastest():
    times = {"a": {"x": 0.0, "y": 3.0}, "b": {"x": 0.0, "y": 3.0}, "c": {"x": 1.0, "y": 3.0}}
    assert scoring.scores(times) == {"a": 1.0, "b": 1.0, "c": 0.5}


def test_a_bootstrap_interval_holds_the_median_and_is_a_point_for_equal_values():
    assert scoring.bootstrap([3.0] * 5) == (3.0, 3.0)
    low, high = scoring.bootstrap([1.0, 2.0, 3.0, 4.0, math.inf])
    assert low <= 3.0 <= high
    assert high == math.inf


def test_unequal_tuning_is_not_ranked():
    one = scoring.Tuning({"rate": "over a factor of 1000", "decay": "of 2 values"}, 5, 1)
    same = one._replace(space={"rate": "over a factor of 1000", "momentum": "of 4 values"})
    scoring.check_equal_tuning({"a": one, "b": same, "c": one})
    for other in (
        one._replace(space={"rate": "over a factor of 1000"}),
        one._replace(space={**one.space, "rate": "over a factor of 10"}),
        one._replace(trials=6),
        one._replace(studies=3),
    ):
        with pytest.raises(UserError, match="can't be ranked"):
            scoring.check_equal_tuning({"a": one, "b": same, "c": other})


def test_leaving_a_workload_out_scores_the_rest():
    times = {"a": {"x": 1.0, "y": math.inf}, "b": {"x": 2.5, "y": 3.0}}
    assert scoring.without_each(times) == {"x": {"a": 0.0, "b": 1.0}, "y": {"a": 1.0, "b": 0.5}}
    assert scoring.without_each({"a": {"x": 1.0}}) == {}


def test_an_interval_of_a_score_holds_it_and_is_a_point_without_noise():
    seeds = {
        "a": {"x": [1.0, 1.2, 1.1, 1.3, 0.9], "y": [5.0, 4.0, 6.0, 5.5, math.inf]},
        "b": {"x": [2.0] * 5, "y": [4.0] * 5},
    }
    medians = {
        n: {w: scoring.study_score([[t] for t in v]) for w, v in own.items()}
        for n, own in seeds.items()
    }
    score, found = scoring.scores(medians), scoring.bootstrap_scores(seeds)
    for name, (low, high) in found.items():
        assert low <= score[name] <= high
    assert scoring.bootstrap_scores(seeds) == found
    fixed = {"a": {"x": [1.0] * 3}, "b": {"x": [2.5] * 3}}
    assert scoring.bootstrap_scores(fixed) == {"a": (1.0, 1.0), "b": (0.5, 0.5)}


def test_an_even_number_of_seeds_has_the_median_of_its_middle_two():
    assert scoring.bootstrap([1.0, 1.0, 3.0, 3.0], level=0.0) == (2.0, 2.0)
    assert scoring.bootstrap([1.0, math.inf])[1] == math.inf


def test_who_wins_is_apart_from_all_others():
    assert scoring.winner({"a": [1.0, 1.1, 1.2]}) == ""
    assert scoring.winner({"a": [1.0, 1.1, 1.2], "b": [1.15, 2.0, 3.0]}) == ""
    assert scoring.winner({"a": [5.0, 5.1, 5.2], "b": [1.0, 2.0, 3.0]}) == "b"
    assert scoring.winner({"a": [math.inf] * 3, "b": [math.inf] * 3}) == ""
