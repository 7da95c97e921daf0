"""Greedy soup: what it takes, what it leaves, and that it never scores less than the best model."""

import numpy as np
import pytest

from lamina.platform import merging
from lamina.platform.errors import UserError
from lamina.platform.merging import soup


def models(*values):
    return [{"w": np.asarray(value, np.float32)} for value in values]


def near(target):
    return lambda tree: -float(((np.asarray(tree["w"]) - np.asarray(target)) ** 2).sum())


def test_the_best_comes_first_and_only_what_helps_is_taken():
    found = soup.cook(models([3.0], [1.0], [-0.8], [9.0]), near([0.0]))
    assert found.members == (2, 1)  # -0.8 and 1 give 0.1; with 3 or 9 it would be worse
    assert found.params["w"] == pytest.approx(0.1)
    assert [number for number, _ in found.tried] == [1, 0, 3]


def test_ties_are_accepted():
    found = soup.cook(models([1.0, 0.0], [1.0, 5.0]), near([1.0, 0.0]))
    assert found.members == (0,)
    same = soup.cook(models([1.0], [1.0], [1.0]), near([0.0]))
    assert same.members == (0, 1, 2)


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_no_less_than_the_best_and_the_result_is_a_mean_of_a_subset(seed):
    rng = np.random.default_rng(seed)
    given = models(*rng.standard_normal((6, 4)))
    score = near(rng.standard_normal(4) * 0.2)
    found = soup.cook(given, score)
    assert found.score >= max(map(score, given))
    mean = np.mean([given[n]["w"] for n in found.members], axis=0)
    np.testing.assert_allclose(found.params["w"], mean, atol=1e-6)


def test_one_model_is_itself():
    found = soup.cook(models([2.0]), near([0.0]))
    assert (found.members, float(found.params["w"][0])) == ((0,), 2.0)


def test_as_a_merger():
    merged = merging.create("greedy_soup")(models([1.0], [-0.8], [9.0]), score=near([0.0]))
    assert merged["w"] == pytest.approx(0.1)
    with pytest.raises(UserError, match="needs score="):
        merging.create("greedy_soup")(models([1.0]))
    with pytest.raises(UserError, match="takes no weights"):
        merging.create("greedy_soup")(models([1.0]), score=near([0.0]), weights=(1,))
    with pytest.raises(UserError, match="one is no number"):
        merging.create("greedy_soup")(models([1.0]), score=lambda tree: float("nan"))


def test_the_shares_of_the_models_are_told():
    given = models([1.0], [-0.8], [9.0])
    found = merging.create("greedy_soup").fit(given, score=near([0.0]))
    np.testing.assert_allclose(found.coefficients["weight"], [0.5, 0.5, 0.0])
    assert len(found.losses) == 3
