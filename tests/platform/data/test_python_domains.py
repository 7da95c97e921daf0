"""Domains of the standard library's text: equal budgets, nothing twice."""

import numpy as np
import pytest

from lamina.platform.data.python_domains import DOMAINS, python_domains
from lamina.platform.errors import UserError


def test_domains_have_equal_budgets_and_held_out_text_follows_what_is_trained_on():
    found = python_domains(context=10, budget=1005, held_out=100)
    for split, rows in (("train", 100), ("validation", 10), ("test", 10)):
        arrays = found.splits[split].arrays
        np.testing.assert_array_equal(np.bincount(arrays["domains"]), [rows] * len(DOMAINS))
        inputs, labels = arrays["inputs"], arrays["labels"]
        assert inputs.shape == labels.shape == (rows * len(DOMAINS), 10)
        np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
    last = found.splits["train"].arrays["labels"][99, -1]
    assert found.splits["validation"].arrays["inputs"][0, 0] == last
    assert "codecs" in found.decode(found.splits["train"].arrays["inputs"][:100].ravel())


@pytest.mark.parametrize("keys", [{"context": 0}, {"budget": 10, "context": 20}, {"budget": 10**8}])
def test_what_does_not_fit_is_refused(keys):
    with pytest.raises(UserError, match=r"data\.budget|data\.context"):
        python_domains(**keys)
