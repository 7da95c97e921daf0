"""Methods that add up models or task vectors with one coefficient for each tensor.

Letters: M_t models, B base, D_t = M_t - B, w_t weights, T the number of models.
"""

from collections.abc import Sequence

from lamina.platform.merging.method import Array, Method, Numbers, fraction, weighted_sum


def linear(*, normalize: bool = True) -> Method:
    """The weighted mean `sum_t w_t M_t / sum_t w_t` (model soups, Wortsman et al. 2022).

    arXiv 2203.05482. Weights are 1 if none are given.

    Args:
        normalize: whether to divide by the sum of the weights. Default: True, as mergekit's.
    """

    def combine(xp: Numbers, models, base, weights, numbers) -> Array:
        return weighted_sum(models, weights)

    return Method(combine, base=False, normalize=normalize)


def task_arithmetic(*, scale: float = 1.0, normalize: bool = False) -> Method:
    """`B + scale sum_t w_t D_t` (Ilharco et al. 2023, arXiv 2212.04089).

    A negative scale forgets a task. The paper chooses the scale on validation data; 0.3 is its
    value for eight CLIP tasks.

    Args:
        scale: the paper's lambda. Default: 1, as mergekit's.
        normalize: whether to divide the weights by their sum. Default: False.
    """

    def combine(xp: Numbers, models, base, weights, numbers) -> Array:
        deltas = [model - base for model in models]
        return base + weighted_sum(deltas, weights) * weights.dtype.type(scale)

    return Method(combine, base=True, normalize=normalize)


def slerp(*, t: float = 0.5, tolerance: float = 5e-4) -> Method:
    """Spherical interpolation of two models, tensor by tensor (Shoemake 1985).

    `(sin((1-t) o) M_1 + sin(t o) M_2) / sin o` with the angle o between the two tensors, which are
    flattened and not normalised; `(1-t) M_1 + t M_2` where they are almost parallel or opposed.
    With a zero tensor the angle is taken as a right one, as mergekit does.

    Args:
        t: in [0, 1]: 0 gives the first model, 1 the second. Default: 0.5.
        tolerance: in [0, 1]; parallel is `|cos o| >= 1 - tolerance`. Default: 5e-4, as mergekit's.

    Raises:
        ValueError: t or the tolerance is out of range.
    """
    fraction("t", t, zero=True)
    fraction("tolerance", tolerance, zero=True)

    def measure(xp: Numbers, models, base) -> Array:
        first, second = models
        return xp.stack([(first * first).sum(), (second * second).sum(), (first * second).sum()])

    def settle(xp: Numbers, sums: Array, weights: Array) -> Array:
        number = sums.dtype.type
        norms = xp.sqrt(sums[0]) * xp.sqrt(sums[1])
        zero = norms == 0
        cosine = sums[2] / xp.where(zero, number(1), norms)
        parallel = xp.abs(cosine) >= number(1 - tolerance)
        angle = xp.arccos(xp.where(parallel, number(0), cosine))
        sine = xp.sin(angle)
        first = xp.where(parallel, number(1 - t), xp.sin(number(1 - t) * angle) / sine)
        second = xp.where(parallel, number(t), xp.sin(number(t) * angle) / sine)
        return xp.stack([first, second])

    def combine(xp: Numbers, models, base, weights, numbers) -> Array:
        return weighted_sum(models, numbers)

    return Method(
        combine, base=False, weighted="none", least=2, most=2, measure=measure, settle=settle
    )


def model_stock() -> Method:
    """`r mean_t M_t + (1 - r) B` with r from the angle between task vectors, tensor by tensor.

    `r = T c / (1 + (T - 1) c)`, c the mean cosine of the pairs of task vectors (Jang et al. 2024,
    arXiv 2403.19522). Where a task vector is zero its cosines are taken as 0. A cosine so negative
    that the denominator is no longer positive gives r = 0.
    """

    def measure(xp: Numbers, models, base) -> Array:
        deltas = [model - base for model in models]
        rows = [xp.stack([(one * other).sum() for other in deltas]) for one in deltas]
        return xp.stack(rows)

    def settle(xp: Numbers, sums: Array, weights: Array) -> Array:
        number = sums.dtype.type
        count = sums.shape[0]
        lengths = xp.sqrt(xp.diagonal(sums))
        products = lengths[:, None] * lengths[None, :]
        zero = products == 0
        cosines = xp.where(zero, number(0), sums / xp.where(zero, number(1), products))
        pairs = xp.triu(xp.clip(cosines, number(-1), number(1)), 1)
        cosine = pairs.sum() / number(count * (count - 1) / 2)
        divisor = number(1) + number(count - 1) * cosine
        positive = divisor > 0
        ratio = number(count) * cosine / xp.where(positive, divisor, number(1))
        return xp.where(positive, ratio, number(0))

    def combine(xp: Numbers, models: Sequence[Array], base, weights, numbers) -> Array:
        deltas = [model - base for model in models]
        return base + weighted_sum(deltas, weights) * numbers

    return Method(
        combine,
        base=True,
        weighted="none",
        normalize=True,
        least=2,
        measure=measure,
        settle=settle,
    )
