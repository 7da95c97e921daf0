"""Methods that thin out task vectors before adding them up.

Letters: B base, D_t = M_t - B the task vectors, w_t weights.
"""

from collections.abc import Sequence

from lamina.platform.merging.method import (
    Array,
    Drop,
    Method,
    Numbers,
    Trim,
    fraction,
    weighted_sum,
)


def ties(*, density: float = 0.2, scale: float = 1.0, normalize: bool = True) -> Method:
    """TIES as in the paper: trim over the whole model, elect signs, merge those that agree.

    1. Each D_t keeps its `floor(density n)` largest entries, n the size of the model.
    2. The elected sign of an entry is that of `sum_t w_t D_t`; where this is zero, the sign that is
       elected most often in the model, and minus if there is no majority.
    3. The merged entry is the weighted mean of the kept D_t that have the elected sign.

    The result is `B + scale merged`. Yadav et al. 2023, arXiv 2306.01708. The authors' code keeps
    one entry more. The paper has no weights; with equal ones this is the paper's method.

    Args:
        density: fraction of entries kept. Default: 0.2, the paper's.
        scale: the paper's lambda. Default: 1, the paper's without validation data.
        normalize: a mean over those that agree, or else a sum. Default: True.

    Raises:
        ValueError: a density outside of [0, 1].
    """
    trim = Trim(fraction("density", density, zero=True), per_tensor=False)
    return _elected(trim, scale, normalize)


def ties_per_tensor(*, density: float = 0.2, scale: float = 1.0, normalize: bool = True) -> Method:
    """TIES with the trimming tensor by tensor, as mergekit does it (arXiv 2306.01708).

    It differs from `ties` in two ways: n is the size of the tensor (of one layer, where layers are
    stacked), and the elected sign is plus where `sum_t w_t D_t` is zero.

    Args:
        density: fraction of entries kept. Default: 0.2, the paper's.
        scale: factor of the merged task vector. Default: 1.
        normalize: a mean over those that agree, or else a sum. Default: True.

    Raises:
        ValueError: a density outside of [0, 1].
    """
    trim = Trim(fraction("density", density, zero=True), per_tensor=True)
    return _elected(trim, scale, normalize)


def _elected(trim: Trim, scale: float, normalize: bool) -> Method:
    def vote(xp: Numbers, deltas: Sequence[Array], weights: Array) -> Array:
        return xp.sign(weighted_sum(deltas, weights)).sum()

    def combine(xp: Numbers, deltas: Sequence[Array], base, weights, numbers) -> Array:
        number = weights.dtype.type
        total = weighted_sum(deltas, weights)
        # Plus or minus one: the elected sign. Sums of products with it are half the work of masks.
        positive = (total >= 0) if trim.per_tensor else (total > 0) | ((total == 0) & (numbers > 0))
        elected = positive.astype(base.dtype) * number(2) - number(1)
        agreeing = [xp.maximum(delta * elected, number(0)) for delta in deltas]
        merged = weighted_sum(agreeing, weights) * elected
        if normalize:
            counted = [(entry > 0).astype(base.dtype) for entry in agreeing]
            divisor = weighted_sum(counted, weights)
            merged = merged / (divisor + (divisor == 0).astype(base.dtype))
        return base + merged * number(scale)

    return Method(combine, base=True, prune=trim, vote=None if trim.per_tensor else vote)


def dare(
    *, density: float = 0.1, scale: float = 1.0, normalize: bool = False, seed: int = 0
) -> Method:
    """DARE: drops entries at random, and divides the others by the probability to stay.

    `B + scale sum_t w_t m_t D_t / density` with `m_t` drawn as Bernoulli(density) for each entry,
    so that its expectation is task arithmetic. Yu et al. 2024, arXiv 2311.03099.

    Args:
        density: probability to stay. Default: 0.1 (the paper drops 0.9 for language models).
        scale: factor of the merged task vector. Default: 1.
        normalize: whether to divide the weights by their sum. Default: False.
        seed: of the draws; those of an entry depend on it, the tensor's path, the model's number
            and the place, and not on order, pieces or devices.

    Raises:
        ValueError: a density outside of (0, 1].
    """
    return _dropped(
        Drop(fraction("density", density, zero=False), "density", seed), scale, normalize
    )


def dare_l1(
    *, density: float = 0.1, scale: float = 1.0, normalize: bool = False, seed: int = 0
) -> Method:
    """DARE as mergekit rescales it: each tensor of a task vector keeps its sum of magnitudes.

    As `dare`, with `sum |D_t| / sum |m_t D_t|` over the tensor in place of `1 / density`.

    Args:
        density: probability to stay. Default: 0.1.
        scale: factor of the merged task vector. Default: 1.
        normalize: whether to divide the weights by their sum. Default: False.
        seed: of the draws.

    Raises:
        ValueError: a density outside of (0, 1].
    """
    return _dropped(Drop(fraction("density", density, zero=False), "l1", seed), scale, normalize)


def _dropped(drop: Drop, scale: float, normalize: bool) -> Method:
    def combine(xp: Numbers, deltas: Sequence[Array], base, weights, numbers) -> Array:
        return base + weighted_sum(deltas, weights * numbers) * weights.dtype.type(scale)

    def settle_density(xp: Numbers, sums: Array, weights: Array) -> Array:
        return xp.ones_like(weights) / weights.dtype.type(drop.density)

    def settle_l1(xp: Numbers, sums: Array, weights: Array) -> Array:
        kept = sums[1]
        zero = kept == 0
        return xp.where(
            zero, sums.dtype.type(1), sums[0] / xp.where(zero, sums.dtype.type(1), kept)
        )

    settle = settle_l1 if drop.rescale == "l1" else settle_density
    return Method(combine, base=True, normalize=normalize, prune=drop, settle=settle)
