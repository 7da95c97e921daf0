"""What a leaf-wise method is: formulas that numpy (files) and jax.numpy (trees) both evaluate.

A method goes through up to four stages, of which most methods have one or two. Letters: `M_t` the
models, `B` the base, `D_t = M_t - B`, `w_t` the weights, t = 1..T.

1. `measure` adds up a few numbers over a tensor, such as the inner products of all models;
   `settle` makes coefficients of them.
2. `trim` keeps the largest entries of each `D_t`, or `drop` random ones.
3. `vote` adds up one number over all tensors.
4. `combine` computes the merged entries, each from the entries at the same place.

Stages 1, 3 and 4 see any piece of a tensor, so that a file is merged in pieces of any size; a
method that must see a matrix as a whole has `whole` in their place.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Array = Any
"""A numpy or a jax array."""

Numbers = types.ModuleType
"""`numpy` or `jax.numpy`."""


class Trim(NamedTuple):
    """Keeps the `floor(density n)` entries of largest magnitude of each task vector.

    Of equal magnitudes at the limit those that come first are kept; zeros count as dropped.

    Attributes:
        density: fraction kept, in [0, 1].
        per_tensor: whether n counts a tensor, or all tensors of the model together.
    """

    density: float
    per_tensor: bool


class Drop(NamedTuple):
    """Keeps each entry of a task vector with probability `density`.

    Attributes:
        density: probability, in (0, 1].
        rescale: "density" multiplies what stays by 1 / density, "l1" by what restores the sum of
            magnitudes of the tensor.
        seed: of the draws, which depend on it, the tensor's path, the model's number and the
            entry's place in the tensor, and on nothing else.
    """

    density: float
    rescale: str
    seed: int


class Method(NamedTuple):
    """A leaf-wise method; see the module's docstring.

    Attributes:
        combine: `(xp, values, base, weights, numbers) -> merged`. `values` are the models' entries,
            or the trimmed task vectors' if the method prunes; `numbers` is what `settle` or `vote`
            gave.
        base: whether the method needs a base.
        weighted: which weights it takes: "none", "any", those of a "mean", whose sum isn't 0, or
            "shares", of which none is negative either.
        needs: what each model comes with besides, a tree like it: "fishers", whose entries follow
            the models' in `values`; "" for nothing.
        normalize: whether the weights are divided by their sum before all else.
        least: the fewest models it takes.
        most: the most, or 0.
        measure: `(xp, values, base) -> sums`, an array that adds up over the pieces of a tensor.
        settle: `(xp, sums, weights) -> numbers`.
        prune: how task vectors are thinned out.
        vote: `(xp, values, weights) -> sums`, which add up over all tensors.
        whole: `(xp, values, base, weights, axes) -> merged` for one tensor without its `layers`
            axis; no axes are known of one that isn't to be seen as a matrix.
    """

    combine: Callable[..., Array] | None
    base: bool
    weighted: Literal["none", "any", "mean", "shares"] = "any"
    needs: str = ""
    normalize: bool = False
    least: int = 1
    most: int = 0
    measure: Callable[[Numbers, Sequence[Array], Array], Array] | None = None
    settle: Callable[[Numbers, Array, Array], Array] | None = None
    prune: Trim | Drop | None = None
    vote: Callable[[Numbers, Sequence[Array], Array], Array] | None = None
    whole: Callable[..., Array] | None = None

    def weights(self, count: int, given: Any) -> Array:
        """Returns the weights of `count` models, divided by their sum if the method normalises.

        Args:
            count: how many models there are.
            given: one number for each model, or None for ones; an array of any kind stays one.

        Raises:
            ValueError: the number of models is wrong, the method takes no such weights, or there
                is not one finite number for each model.
        """
        if count < self.least or (self.most and count > self.most):
            wanted = f"{self.least}" if self.most == self.least else f"{self.least} or more"
            raise ValueError(f"takes {wanted} models, not {count}")
        if given is not None and self.weighted == "none":
            raise ValueError("takes no weights")
        weights = np.ones(count) if given is None else given
        if not hasattr(weights, "dtype"):
            try:
                weights = np.asarray(weights, np.float64)
            except TypeError as error:
                raise ValueError(f"weights = {weights!r} should be numbers") from error
        if weights.shape != (count,):
            raise ValueError(f"needs {count} weights, one for each model, not {weights.shape}")
        concrete = isinstance(weights, np.ndarray)
        if concrete and not np.isfinite(weights).all():
            raise ValueError(f"weights should be finite numbers, not {weights.tolist()}")
        if concrete and self.weighted == "shares" and (weights < 0).any():
            raise ValueError(f"weights should not be negative, as in {weights.tolist()}")
        with np.errstate(over="ignore"):
            total = weights.sum()
        divides = self.normalize or self.weighted in ("mean", "shares")
        if concrete and divides and (total == 0 or not np.isfinite(total)):
            raise ValueError(
                f"divides by the sum of the weights {weights.tolist()}, which is {total:g}"
            )
        return weights / total if self.normalize else weights


def weighted_sum(values: Sequence[Array], weights: Array) -> Array:
    """Returns `sum_t w_t values_t`, added up in the order of the models."""
    total = values[0] * weights[0]
    for number in range(1, len(values)):
        total = total + values[number] * weights[number]
    return total


def count_kept(size: int, density: float) -> int:
    """Returns how many of `size` entries a density keeps: `floor(density size)`."""
    return int(density * size)


def fraction(name: str, value: float, *, zero: bool) -> float:
    """Returns `value`, which must lie in [0, 1] or, without `zero`, in (0, 1].

    Raises:
        ValueError: it doesn't.
    """
    if not (0 <= value <= 1 and (zero or value > 0)):
        raise ValueError(f"{name} = {value} should lie in {'[' if zero else '('}0, 1]")
    return value
