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


def cook(models: Sequence[Tree], score: Callable[[Tree], float]) -> Soup:
    """Makes a greedy soup (Wortsman et al. 2022, arXiv 2203.05482, recipe 1).

    The models are sorted by their scores, of equal ones the first comes first. The soup begins with
    the best; each further model stays in it if the score of the mean is then at least what it was.

    Args:
        models: trees of one structure.
        score: of a tree, on validation data; the more the better.

    Raises:
        ValueError: there is no model, or a score is NaN.
    """
    from lamina.platform.merging import mergers

    models = list(models)
    if not models:
        raise ValueError("there are no models to merge")
    mean = mergers.leafwise("linear", linear())
    scores = [float(score(model)) for model in models]
    if any(value != value for value in scores):
        raise ValueError(f"the scores of the models are {scores}: one is no number")
    order = sorted(range(len(models)), key=lambda number: -scores[number])
    members, best, params = [order[0]], scores[order[0]], models[order[0]]
    tried = []
    for number in order[1:]:
        mixed = mean([models[n] for n in (*members, number)])
        reached = float(score(mixed))
        tried.append((number, reached))
        if reached >= best:
            members, best, params = [*members, number], reached, mixed
    return Soup(params, tuple(members), best, tuple(scores), tuple(tried))


def greedy_soup() -> Any:
    """The merger of `cook`: `merger(models, score=...)`, from a tree to its validation score.

    The more the better: give the negative of a loss. `merger.fit` gives what each model weighs in
    the soup as `coefficients`, and the negative scores of the best model and of each soup that was
    tried as `losses`.

    Returns:
        A `Merger`.
    """
    import jax.numpy as jnp
    import numpy as np

    from lamina.platform.merging import learned, mergers

    def fit(models, *, base=None, weights=None, axes=None, score=None) -> learned.Learned:
        if score is None:
            raise ValueError("needs score=: a function from parameters to a validation score")
        if weights is not None:
            raise ValueError("takes no weights: it chooses them")
        models = list(models)
        made = cook(models, score)
        shares = np.zeros(len(models), np.float32)
        shares[list(made.members)] = 1 / len(made.members)
        scores = [max(made.scores), *(reached for _, reached in made.tried)]
        return learned.Learned(made.params, {"weight": shares}, -jnp.asarray(scores, jnp.float32))

    apply = lambda models, **given: fit(models, **given).params
    return mergers.Merger("greedy_soup", apply, False, False, needs="score", fit=fit)
