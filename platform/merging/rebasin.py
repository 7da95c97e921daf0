"""The merger `weight_matching`: models are permuted to fit each other, then averaged."""

from typing import Any

from lamina.platform.merging.averages import linear

Tree = Any


def weight_matching(*, seed: int = 0, restarts: int = 1, rounds: int = 10) -> Any:
    """The weighted mean of models whose units are matched (Ainsworth et al. 2022, 2209.04836).

    Called as `merger(models, spec=symmetries.derive(model, data).spec)`; with batch statistics, the
    trees are those of `symmetries.joined`. All models are matched to the first. Of three and more,
    each but the first is then matched to the mean of the others, until none moves (the paper's
    MergeMany; it starts without a match to the first, and lets the first move too).

    Args:
        seed: of the order in which groups of units are visited.
        restarts: starts of each matching, of which the best counts. Default: 1.
        rounds: of three and more models at most. Default: 10.

    Returns:
        A `Merger`.
    """
    if restarts < 1 or rounds < 0:
        raise ValueError(f"restarts = {restarts} should be 1 or more, rounds = {rounds} 0 or more")
    # Imported here, because merging files by other methods needs no jax.
    from lamina.platform.merging import matching, mergers

    mean = mergers.leafwise("linear", linear())

    def apply(models, *, base, weights, axes, spec=None) -> Tree:
        if spec is None:
            raise ValueError("needs spec=: what may be permuted, as symmetries.derive finds it")
        if not models:
            raise ValueError("there are no models to merge")
        align = lambda reference, other: matching.align(
            spec, reference, other, seed=seed, restarts=restarts
        )
        models = [models[0], *(align(models[0], model) for model in models[1:])]
        if len(models) > 2:
            models = matching.settle(spec, models, rounds=rounds, seed=seed)
        return mean(models, weights=weights, axes=axes)

    return mergers.Merger("weight_matching", apply, False, False, needs="spec")
