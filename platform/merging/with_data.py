"""Methods that need data, by their keys; their formulas are in files of their own.

What needs jax is imported when one is made: merging files needs none.
"""

from collections.abc import Sequence
from typing import Any, Literal

from lamina.platform.merging.method import Array, Method, Numbers, fraction, weighted_sum


def adamerging(
    *,
    coefficients: Literal["task", "layer"] = "layer",
    objective: Literal["entropy", "labels"] = "entropy",
    start: float = 0.3,
    learning_rate: float = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    clip: bool = True,
) -> Any:
    """AdaMerging: `B + sum_t c_t D_t` whose coefficients make the merged model sure of itself.

    Adam on the mean entropy of the predictions for unlabelled inputs (Yang et al. 2024, arXiv
    2310.02575). `merger(models, base=..., loss=..., batches=..., held=...)` takes the loss (see
    `learned.Loss`; the paper's is `learned.entropy`, summed over the tasks), a batch for each step,
    and what the loss sees in every step; `merger.fit` gives the coefficients and losses besides.
    A loss of one identity is compiled once. Weights multiply the task vectors. With the learning
    rate 0 it is task arithmetic at `scale = start`.

    Args:
        coefficients: "task" has one for each model, "layer" one for each model and tensor (and
            layer of a stack), as the authors' code.
        objective: what the program `merge` minimises: the entropy, without labels, or the
            cross-entropy of labels (as aTLAS does, Zhang et al. 2024, arXiv 2407.02880), which
            tells what such coefficients could reach. In Python the loss is what you give.
        start: of all coefficients. Default: 0.3, the paper's.
        learning_rate: Adam's. Default: 1e-3, the paper's.
        b1: Adam's. Default: 0.9.
        b2: Adam's. Default: 0.999.
        clip: whether coefficients are put back into [0, 1] after each step. Default: True. (The
            authors' code clamps them where they are used, so that one beyond gets no gradient.)

    Returns:
        A `Merger`.
    """
    from lamina.platform.merging import learned

    return learned.merger(coefficients, objective, start, learning_rate, b1, b2, clip)


def fisher(*, floor: float = 1e-6, normalize: bool = True) -> Method:
    """The mean weighted by each model's diagonal Fisher information, entry by entry.

    `sum_t w_t F_t M_t / sum_t w_t F_t` (Matena & Raffel 2022, arXiv 2111.09832).
    `merger(models, fishers=...)` takes a tree like the parameters for each model, as
    `fisher.diagonal` makes them.

    Args:
        floor: smallest value of F; where all are smaller the mean is the plain one. Default: 1e-6,
            of F as normalised.
        normalize: whether each F is divided by its Euclidean norm over the whole model, so that a
            task of large gradients doesn't outweigh the others. Default: True, as the authors'.

    Returns:
        A `Method`.

    Raises:
        ValueError: floor isn't positive.
    """
    if floor <= 0:
        raise ValueError(f"floor = {floor} should be larger than 0")

    def vote(xp: Numbers, values: Sequence[Array], weights: Array) -> Array:
        return xp.stack([(f * f).sum() for f in values[len(values) // 2 :]])

    def combine(xp: Numbers, values: Sequence[Array], base, weights, numbers) -> Array:
        models, fishers = values[: len(values) // 2], values[len(values) // 2 :]
        one = weights.dtype.type(1)
        if normalize:
            norms = xp.sqrt(numbers)
            scales = one / xp.where(norms == 0, one, norms)
            fishers = [f * scales[t] for t, f in enumerate(fishers)]
        shares = [xp.maximum(f, weights.dtype.type(floor)) for f in fishers]
        products = [share * model for share, model in zip(shares, models, strict=True)]
        return weighted_sum(products, weights) / weighted_sum(shares, weights)

    norm = vote if normalize else None
    return Method(combine, base=False, weighted="shares", needs="fishers", vote=norm)


def regmean(*, alpha: float = 0.9) -> Any:
    """`(sum_t w_t G_t)^-1 sum_t w_t G_t W_t` for each dense kernel, the plain mean for the rest.

    `G_t = X_t^T X_t / rows`, with entries off the diagonal multiplied by alpha (Jin et al. 2023,
    arXiv 2212.09849), of the inputs X_t that the kernel of model t sees on its own data; the paper
    sums where we take the mean over rows, so that much data weighs as much as little.
    `merger(models, grams=...)` takes for each model what `grams.collect` gives. Kernels without a
    matrix are averaged, and so are the rows of inputs that are always zero.

    Args:
        alpha: factor of the off-diagonal entries, in [0, 1]. 0 leaves a weighted mean, row by row;
            at 1 a singular sum is solved by its pseudoinverse, staying near the plain mean.
            Default: 0.9, the paper's.

    Returns:
        A `Merger`.

    Raises:
        ValueError: alpha is out of range.
    """
    fraction("alpha", alpha, zero=True)
    from lamina.platform.merging import regmean as formulas

    return formulas.merger(alpha)
