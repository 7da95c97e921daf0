"""The quadratic has the curvatures that it says, and a minimum of 0."""

import numpy as np
import pytest

from lamina.platform.data.quadratic import quadratic
from lamina.platform.errors import UserError


def test_the_loss_of_a_linear_model_has_the_stated_eigenvalues_and_no_rest():
    dataset = quadratic(dimensions=16, condition=1e3, seed=1)
    assert dataset.spec.outputs == 1
    arrays = dataset.splits["train"].arrays
    x, y = arrays["inputs"].astype(np.float64), arrays["labels"].astype(np.float64)
    with_bias = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    found = np.linalg.eigvalsh(with_bias.T @ with_bias / len(x))
    expected = np.sort([*np.geomspace(1e-3, 1.0, 16), 1.0])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    solution, *_ = np.linalg.lstsq(with_bias, y, rcond=None)
    assert np.mean((with_bias @ solution - y) ** 2) < 1e-10
    diagonal = np.diag(x.T @ x / len(x))
    assert diagonal.max() / diagonal.min() < 100  # rotated: no coordinate has an extreme curvature


@pytest.mark.parametrize("keys", [{"dimensions": 1}, {"condition": 0.5}, {"condition": np.nan}])
def test_what_is_no_quadratic_is_refused(keys):
    with pytest.raises(UserError, match="dimensions"):
        quadratic(**keys)
