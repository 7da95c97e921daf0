"""Records as curves over steps, with mean and spread over seeds."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lamina.platform.reporting.records import Record

POINTS = 240
"""Points that a drawn curve keeps (our choice: about one per pixel of a small chart)."""


class Curve(NamedTuple):
    """One metric of one split over steps (N points).

    Attributes:
        steps: int [N], increasing.
        mean: float [N], the mean over the seeds that are finite there; NaN where none is.
        std: float [N], their sample standard deviation, 0 where there is one.
        seeds: the number of seeds.
        lost: (seed, step) where a seed's value first was not finite.
    """

    steps: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    seeds: int
    lost: tuple[tuple[int, int], ...] = ()

    @property
    def last(self) -> float | None:
        """The newest mean, or None where it isn't finite."""
        return float(self.mean[-1]) if len(self.mean) and np.isfinite(self.mean[-1]) else None


def collect(records: Iterable[Record]) -> dict[str, dict[str, Curve]]:
    """Curves by metric name and split, both in the order in which they first appear.

    Args:
        records: the run's records; of two for one seed and step the later counts.

    Returns:
        {name: {split: curve}}
    """
    grouped: dict[str, dict[str, dict[int, dict[int, float | None]]]] = {}
    for record in records:
        by_split = grouped.setdefault(record.name, {}).setdefault(record.split, {})
        by_split.setdefault(record.seed, {})[record.step] = record.value
    return {
        name: {split: _curve(by_seed) for split, by_seed in splits.items()}
        for name, splits in grouped.items()
    }


def _curve(by_seed: dict[int, dict[int, float | None]]) -> Curve:
    steps = sorted({step for values in by_seed.values() for step in values})
    place = {step: index for index, step in enumerate(steps)}
    values = np.full((len(by_seed), len(steps)), np.nan)
    lost = []
    for row, (seed, logged) in enumerate(by_seed.items()):
        for step, value in logged.items():
            values[row, place[step]] = np.nan if value is None else value
        missing = [step for step, value in logged.items() if value is None]
        if missing:
            lost.append((seed, min(missing)))
    known = np.isfinite(values)
    count = known.sum(axis=0)
    mean = np.where(known, values, 0.0).sum(axis=0) / np.maximum(count, 1)
    squares = np.where(known, (values - mean) ** 2, 0.0).sum(axis=0)
    return Curve(
        steps=np.asarray(steps),
        mean=np.where(count > 0, mean, np.nan),
        std=np.sqrt(squares / np.maximum(count - 1, 1)),
        seeds=len(by_seed),
        lost=tuple(lost),
    )


def thin(curve: Curve, points: int = POINTS) -> Curve:
    """A curve with fewer points that looks the same: of each stretch its lowest and highest.

    Args:
        curve: the curve.
        points: how many points to keep at most, besides the first and the last.

    Returns:
        The curve at some of its steps; extremes (a spike of the loss) are among them.
    """
    if len(curve.steps) <= points:
        return curve
    kept = {0, len(curve.steps) - 1}
    for stretch in np.array_split(np.arange(len(curve.steps)), points // 2):
        values = curve.mean[stretch]
        if np.isfinite(values).any():
            kept |= {int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])}
    index = np.array(sorted(kept))
    return curve._replace(steps=curve.steps[index], mean=curve.mean[index], std=curve.std[index])


def wants_log(curves: Sequence[Curve]) -> bool:
    """Whether a logarithmic axis shows these curves better: all positive, and over a factor of 20.

    The factor is our choice: below it a linear axis still shows both ends.
    """
    means = np.concatenate([curve.mean for curve in curves]) if curves else np.zeros(0)
    means = means[np.isfinite(means)]
    return bool(len(means)) and bool(means.min() > 0) and bool(means.max() > 20 * means.min())
