"""Methods on the singular values of task matrices."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lamina.platform.merging.method import Array, Method, Numbers, weighted_sum

Axes = tuple[str | None, ...]


def iso_c(*, scale: float = 1.0) -> Method:
    """Iso-C: the sum of task matrices with all its singular values made equal to their mean.

    With `U S V = svd(sum_t w_t D_t)` the result is `B + scale mean(S) U V` for matrices, and
    `B + scale sum_t w_t D_t / sum_t w_t` for other tensors. Marczak et al. 2025, arXiv 2502.04959.
    Kernels of attention and convolutions are matrices by their logical axes, inputs by outputs;
    without axes the last dimension is the outputs. The layers of a stack are merged one by one.
    Files tell no axes: of them only tensors of two dimensions are matrices, as in the authors' code
    (which takes the mean for convolutions, and leaves out CLIP's text projection).

    Args:
        scale: the paper's alpha, which it chooses on validation data. Default: 1.
    """

    def whole(
        xp: Numbers, models: Sequence[Array], base: Array, weights: Array, axes: Axes
    ) -> Array:
        # Imported here, because merging files by other methods needs no jax.
        from lamina.models.axes import matrix_split

        deltas = [model - base for model in models]
        total = weighted_sum(deltas, weights)
        if not is_matrix(axes) or not base.size:
            return base + total / weights.sum() * weights.dtype.type(scale)
        _, split = matrix_split(axes)
        rows = 1
        for size in base.shape[:split]:
            rows *= size
        left, values, right = _svd(xp)(total.reshape(rows, -1))
        flat = values.mean() * (left @ right)
        return base + flat.reshape(base.shape) * weights.dtype.type(scale)

    return Method(None, base=True, weighted="mean", whole=whole)


def _svd(xp: Numbers) -> Callable[..., Any]:
    svd = functools.partial(xp.linalg.svd, full_matrices=False)
    if xp is np:
        return svd
    from lamina.platform.linear_algebra import one_by_one

    return one_by_one(svd)


def is_matrix(axes: Axes) -> bool:
    """Tells whether a tensor (without its `layers` axis) maps inputs to outputs.

    The bias of an attention's projection has two dimensions, `(heads, head_dim)`, and is none.
    """
    from lamina.models.axes import HEAD_DIM, HEADS, KV_HEADS

    heads = {HEADS, KV_HEADS, HEAD_DIM}
    return len(axes) >= 2 and not set(axes) <= heads
