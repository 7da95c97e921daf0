"""Greedy soup: adds models to an average as long as that doesn't hurt a score on held-out data."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lamina.platform.merging.averages import linear

Tree = Any


class Soup(NamedTuple):
    """What a greedy soup is made of.

    Attributes:
        params: the mean of its members.
        members: numbers of the models in it, in the order in which they were taken.
        score: of `params`; at least that of the best model.
        scores: of the models alone, in their order.
        tried: for each model after the best, in the order of scores: its number, and the score of
            the soup with it.
    """

    params: Tree
    members: tuple[int, ...]
    score: float
    scores: tuple[float, ...]
    tried: tuple[tuple[int, float], ...]


def cook(models: Sequence[Tree], score: Callable[[Tree], float], *, mode: str = "max") -> Soup:
    """Makes a greedy soup (Wortsman et al. 2022, arXiv 2203.05482, recipe 1).

    The models are sorted by their scores, of equal ones the first comes first. The soup begins with
    the best; each further model stays in it if the score of the mean is then at least what it was.

    Args:
        models: trees of one structure.
        score: of a tree, on validation data.
        mode: "max", or "min" where a low score is good.

    Raises:
        ValueError: there is no model, or a score is NaN.
    """
    from lamina.platform.merging import mergers

    if not models:
        raise ValueError("there are no models to merge")
    sign = {"max": 1.0, "min": -1.0}[mode]
    mean = mergers.leafwise("linear", linear())
    scores = [sign * float(score(model)) for model in models]
    if any(value != value for value in scores):
        raise ValueError(f"the scores of the models are {scores}: one is no number")
    order = sorted(range(len(models)), key=lambda number: -scores[number])
    members, best, params = [order[0]], scores[order[0]], models[order[0]]
    tried = []
    for number in order[1:]:
        mixed = mean([models[n] for n in (*members, number)])
        reached = sign * float(score(mixed))
        tried.append((number, sign * reached))
        if reached >= best:
            members, best, params = [*members, number], reached, mixed
    alone = tuple(sign * value for value in scores)
    return Soup(params, tuple(members), sign * best, alone, tuple(tried))


def greedy_soup(*, mode: str = "max") -> Any:
    """The merger of `cook`: `merger(models, score=...)`, with a function from a tree to its score.

    Args:
        mode: "max", or "min" where a low score is good. Default: "max".

    Returns:
        A `Merger`.
    """
    from lamina.platform.merging import mergers

    if mode not in ("max", "min"):
        raise ValueError(f"mode = {mode!r} should be 'max' or 'min'")

    def apply(models, *, base, weights, axes, score=None) -> Tree:
        if score is None:
            raise ValueError("needs score=: a function from parameters to a validation score")
        if weights is not None:
            raise ValueError("takes no weights: it chooses them")
        return cook(list(models), score, mode=mode).params

    return mergers.Merger("greedy_soup", apply, False, False)
