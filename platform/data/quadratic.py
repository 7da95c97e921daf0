"""A quadratic whose curvatures are known, as the least squares of a linear model."""

import numpy as np

from lamina.models.spec import DataSpec
from lamina.platform.data.dataset import ArraySource, Dataset
from lamina.platform.errors import UserError


def quadratic(*, dimensions: int = 64, condition: float = 1e4, seed: int = 0) -> Dataset:
    """Returns examples whose mean squared error is a quadratic of a chosen condition number.

    The inputs X [N, D] have `X^T X / N = V diag(l) V^T`, with D eigenvalues l spaced evenly in the
    logarithm from 1 down to 1 / condition and a random rotation V (so that scaling the coordinates
    doesn't solve it); their columns add up to 0. The labels are `X w*`, with w* from a standard
    normal distribution. So a linear model (`mlp` without hidden layers) with the task `regression`
    and N = 2 D examples in a batch minimises exactly `(w - w*)^T X^T X / N (w - w*) + b^2`: its
    Hessian has the eigenvalues 2 l, and 2 of the bias b; its minimum is 0.

    A deterministic function has no other split: `validation` and `test` hold the same examples.

    Args:
        dimensions: D, the number of weights, at least 2 (default: 64).
        condition: largest over smallest eigenvalue (default: 1e4).
        seed: fixes rotation and minimum.

    Raises:
        UserError: fewer than two dimensions, or a condition below 1.

    Example:
        >>> x = quadratic(dimensions=4, condition=100.0).splits["train"].arrays["inputs"]
        >>> float(np.linalg.cond(x.T @ x).round(1))
        100.0
    """
    if dimensions < 2 or not 1 <= condition < np.inf:
        raise UserError(
            f"data.dimensions = {dimensions} should be at least 2, and data.condition = "
            f"{condition} a number from 1 on"
        )
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, 0]))
    draw = generator.standard_normal
    n = 2 * dimensions
    centred = draw((n, dimensions))
    centred -= centred.mean(axis=0)
    left, right = np.linalg.qr(centred)[0], np.linalg.qr(draw((dimensions, dimensions)))[0]
    eigenvalues = np.geomspace(1.0, 1.0 / condition, dimensions)
    inputs = np.sqrt(n) * (left * np.sqrt(eigenvalues)) @ right.T
    labels = inputs @ draw((dimensions, 1))
    arrays = {"inputs": inputs.astype(np.float32), "labels": labels.astype(np.float32)}
    return Dataset(
        spec=DataSpec((dimensions,), "float32", 1),
        splits={name: ArraySource(dict(arrays)) for name in ("train", "validation", "test")},
        description=f"A quadratic of {dimensions} weights and condition {condition:g}.",
    )
