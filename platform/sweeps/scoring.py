"""The scoring of a shoot-out of optimizers: pure functions of what was measured.

After AlgoPerf (Dahl et al. 2023, arXiv 2306.07179): the time to a validation target decides, a
target that is missed counts as infinite, and optimizers are compared by performance profiles. The
score is the integral of a profile from 1 to `LARGEST` over `LARGEST - 1`, with ratios on a linear
axis. A time that is NaN counts as infinite.

Letters: optimizers O, workloads W, studies S, trials T.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lamina.platform.errors import UserError

LARGEST = 4.0
"""Largest ratio to the fastest that counts (AlgoPerf's)."""


def to_target(
    steps: Sequence[float], values: Sequence[float | None], target: float, mode: str
) -> float:
    """Returns the first step (or second) at which a target was reached; infinity if it wasn't.

    Args:
        steps: of each evaluation, ascending.
        values: of the metric there; None or not finite is no success.
        target: to reach.
        mode: "max" or "min".

    Example:
        >>> to_target([10, 20, 30], [0.5, 0.9, 0.8], 0.85, "max")
        20.0
    """
    for step, value in zip(steps, values, strict=True):
        if value is None or not math.isfinite(value):
            continue
        if value >= target if mode == "max" else value <= target:
            return float(step)
    return math.inf


def study_score(trials: Sequence[Sequence[float]]) -> float:
    """Returns the median over studies of the fastest trial; infinity counts as slowest.

    Args:
        trials: [S][T] times to the target.

    Example:
        >>> study_score([[5.0, 3.0], [math.inf, 4.0], [math.inf, math.inf]])
        4.0
    """
    return float(_medians([np.min(_missed(study)) for study in trials]))


def _missed(times: Sequence[float]) -> np.ndarray:
    """Returns the times, of which NaN is infinite."""
    data = np.asarray(times, float)
    return np.where(np.isnan(data), np.inf, data)


def _medians(times: Any) -> np.ndarray:
    """Returns the medians over the last axis; between a finite and an infinite time: infinity."""
    ordered = np.sort(_missed(times), axis=-1)
    number = ordered.shape[-1]
    return (ordered[..., (number - 1) // 2] + ordered[..., number // 2]) / 2


def ratios(times: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Returns each optimizer's time over the fastest one's, on each workload.

    A workload that nobody has solved gives infinity to all, and so does one that somebody has
    solved in no time to all who took any.

    Args:
        times: optimizer to workload to time.
    """
    workloads = next(iter(times.values())).keys()
    best = {w: float(np.min(_missed([own[w] for own in times.values()]))) for w in workloads}

    def ratio(time: float, least: float) -> float:
        if not math.isfinite(time):
            return math.inf
        return time / least if least else (math.inf if time else 1.0)

    return {name: {w: ratio(own[w], best[w]) for w in workloads} for name, own in times.items()}


def profile(own: Sequence[float], tau: Sequence[float]) -> list[float]:
    """Returns the share of workloads whose ratio is at most tau, for each tau.

    Args:
        own: ratio on each workload.
        tau: places.

    References:
        Dolan and Moré, Benchmarking optimization software with performance profiles, 2002
    """
    return [sum(ratio <= t for ratio in own) / len(own) for t in tau]


def integral(own: Sequence[float], largest: float = LARGEST) -> float:
    """Returns the exact integral of a profile from 1 to `largest`, over `largest - 1`.

    Example:
        >>> integral([1.0, 2.5, math.inf])
        0.5
    """
    parts = [max(0.0, largest - ratio) for ratio in own]
    return sum(parts) / ((largest - 1) * len(own))


def scores(times: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns each optimizer's integrated profile, in [0, 1]: 1 is the fastest everywhere."""
    return {name: integral(list(own.values())) for name, own in ratios(times).items()}


def bootstrap(
    values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the median; infinite values may stay infinite.

    Args:
        values: one for each seed.
        level: coverage.
        draws: resamplings.
        seed: fixes them.

    References:
        Efron, Bootstrap Methods, Annals of Statistics 7 (1979)
    """
    data = np.asarray(values, float)
    generator = np.random.Generator(np.random.Philox(key=seed))
    places = generator.integers(0, len(data), (draws, len(data)))
    return _interval(_medians(data[places]), level)


def _interval(values: Any, level: float) -> tuple[float, float]:
    """Returns the percentiles that leave out half of `1 - level` at either end."""
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def bootstrap_scores(
    seeds: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    level: float = 0.95,
    draws: int = 500,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Returns the percentile bootstrap interval of each optimizer's score over its seeds.

    Args:
        seeds: optimizer to workload to the time of each seed, whose median is the time.
        level: coverage.
        draws: resamplings; each takes all optimizers and workloads anew.
        seed: fixes them.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    found: dict[str, list[float]] = {name: [] for name in seeds}

    def resampled(values: Sequence[float]) -> float:
        places = generator.integers(0, len(values), len(values))
        return float(_medians(np.asarray(values, float)[places]))

    for _ in range(draws):
        times = {
            name: {workload: resampled(values) for workload, values in own.items()}
            for name, own in seeds.items()
        }
        for name, score in scores(times).items():
            found[name].append(score)
    return {name: _interval(values, level) for name, values in found.items()}


def without_each(times: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Returns the scores without one workload, for each that is left out; of one there are none.

    Args:
        times: optimizer to workload to time.
    """
    workloads = list(next(iter(times.values())))
    if len(workloads) < 2:
        return {}
    rest = lambda left: {
        name: {w: t for w, t in own.items() if w != left} for name, own in times.items()
    }
    return {left: scores(rest(left)) for left in workloads}


def winner(seeds: Mapping[str, Sequence[float]]) -> str:
    """Returns the optimizer whose interval lies below those of all others, or "" if none does.

    Who is alone has won nothing.

    Args:
        seeds: optimizer to the time of each seed on one workload.

    Example:
        >>> winner({"a": [1.0, 1.1, 1.2], "b": [2.0, 2.1, 2.2]})
        'a'
    """
    intervals = {name: bootstrap(values) for name, values in seeds.items()}
    first = min(intervals, key=lambda name: intervals[name][1])
    others = [low for name, (low, _) in intervals.items() if name != first]
    return first if others and intervals[first][1] < min(others) else ""


class Tuning(NamedTuple):
    """How an optimizer is tuned.

    Attributes:
        space: key that is searched to how wide, in words that can be compared.
        trials: points of a study.
        studies: independent searches.
    """

    space: Mapping[str, str]
    trials: int
    studies: int


def check_equal_tuning(tunings: Mapping[str, Tuning]) -> None:
    """Refuses to rank optimizers that were tuned unequally.

    Search spaces are equal if they have as many keys, and are equally wide in those that they
    share: where a range lies is a matter of the optimizer, how much of it is tried isn't.

    Args:
        tunings: optimizer to how it is tuned.

    Raises:
        UserError: they differ.
    """

    def refuse(different: Mapping[Any, str], shown: Callable[[Any], str]) -> None:
        if len(different) > 1:
            told = "; ".join(f"{name}: {shown(value)}" for value, name in different.items())
            raise UserError(
                f"optimizers that were tuned unequally can't be ranked ({told}): give all of them "
                "search spaces with as many keys, of the same width, and as many trials and studies"
            )

    first = lambda of: {of(own): name for name, own in reversed(list(tunings.items()))}
    refuse(
        first(lambda own: (len(own.space), own.trials, own.studies)),
        lambda budget: "{} keys, {} trials, {} studies".format(*budget),
    )
    for key in dict.fromkeys(key for own in tunings.values() for key in own.space):
        widths = {own.space[key]: name for name, own in tunings.items() if key in own.space}
        refuse(widths, lambda width, key=key: f"{key} {width}")
