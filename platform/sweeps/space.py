"""Search spaces: which config keys a sweep varies, and over which values.

A space stands in the config as nested blocks like the config's own, with a domain at each key::

    config.sweep.space = dict(
        optimizer=dict(learning_rate=dict(low=1e-4, high=1e-1, scale="log", points=8)),
        model=dict(widths=dict(values=((64,), (256, 256)))),
        clip_norm=(0.5, 1.0),          # short for dict(values=(0.5, 1.0))
    )
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.config import names

_KEYS = ("values", "low", "high", "scale", "points")
_SIGNIFICANT = 6  # digits of a drawn number: a table shows it as it is


class Domain(NamedTuple):
    """The values of one key.

    Attributes:
        key: dotted config key.
        values: the choices; () for a range.
        low: smallest number of a range.
        high: largest number of a range.
        scale: "linear" or "log": how a range is walked and drawn from.
        points: numbers of a range in a grid.
    """

    key: str
    values: tuple = ()
    low: float = 0.0
    high: float = 0.0
    scale: str = "linear"
    points: int = 0

    @property
    def whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def width(self) -> str:
        """How much there is to try, wherever it lies.

        Example:
            >>> Domain("a", low=1e-3, high=1.0, scale="log").width
            'over a factor of 1000'
        """
        if self.values:
            return f"of {len(self.values)} values"
        if self.scale == "log":
            return f"over a factor of {self.high / self.low:.{_SIGNIFICANT}g}"
        return f"over a width of {self.high - self.low:.{_SIGNIFICANT}g}"

    def at(self, place: float) -> Any:
        """Returns the value at a place in [0, 1).

        Example:
            >>> Domain("a", low=1.0, high=100.0, scale="log").at(0.5)
            10.0
        """
        if self.values:
            return self.values[min(int(place * len(self.values)), len(self.values) - 1)]
        if self.whole and self.scale == "linear":
            return min(int(self.low + place * (self.high - self.low + 1)), int(self.high))
        return self._between(place)

    def grid(self) -> tuple:
        """Returns the values of a grid: the choices, or `points` of a range with both ends."""
        if self.values:
            return self.values
        steps = max(self.points - 1, 1)
        return tuple(dict.fromkeys(self._between(i / steps) for i in range(self.points)))

    def _between(self, share: float) -> float | int:
        if self.scale == "log":
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        if self.whole:
            return round(value)
        return float(f"{value:.{_SIGNIFICANT}g}")


def read(
    space: Mapping[str, Any], config: Mapping | FrozenConfigDict, where: str = "sweep.space"
) -> tuple[list[Domain], list[str]]:
    """Reads a space.

    Args:
        space: the nested blocks.
        config: the resolved config whose keys they name.
        where: it stands in the config, for messages.

    Returns:
        The domains, and what is wrong, a sentence each.
    """
    known = configs.flatten(config)
    known = {key: value for key, value in known.items() if not key.startswith("sweep.")}
    domains: list[Domain] = []
    problems: list[str] = []
    for key, entry in _leaves(configs.thaw(space), known):
        if key not in known:
            near = names.nearest(key, known)
            problems.append(f"{where}.{key}: {key} is no key of this config{near}")
        elif key in ("program", "seeds"):
            reason = "every trial is run with all of config.seeds" if key == "seeds" else "fixed"
            problems.append(f"{where}.{key}: {key} can't be searched: {reason}")
        else:
            domain, problem = _domain(key, entry)
            domains += [domain] if domain else []
            problems += [f"{where}.{key}{problem}"] if problem else []
    if not domains and not problems:
        problems.append(
            f"{where} is empty: give values for a config key, such as "
            "optimizer=dict(learning_rate=(1e-3, 1e-2))"
        )
    return domains, problems


def _leaves(space: Any, known: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, domain as written): a block is a domain where the config has a value."""
    for name, entry in space.items():
        key = f"{prefix}{name}"
        inner = any(other.startswith(f"{key}.") for other in known)
        written = isinstance(entry, Mapping) and bool(set(entry) & set(_KEYS))
        if isinstance(entry, Mapping) and entry and (inner or not written):
            yield from _leaves(entry, known, f"{key}.")
        else:
            yield key, entry


def _domain(key: str, entry: Any) -> tuple[Domain | None, str]:
    """Returns the domain, or what is wrong with it."""
    if isinstance(entry, tuple):
        entry = {"values": entry}
    if not isinstance(entry, Mapping):
        hint = names.separated(entry)
        return None, f" = {entry!r} should be a tuple of values, or dict(low=..., high=...){hint}"
    unknown = sorted(set(entry) - set(_KEYS))
    if unknown:
        return None, f".{unknown[0]} is not a key: valid are {', '.join(_KEYS)}"
    if ("values" in entry) == ("low" in entry or "high" in entry):
        return None, " should have either values or low and high"
    if "values" in entry:
        values = entry["values"]
        if not isinstance(values, tuple) or not values:
            return None, f".values = {values!r} should be a tuple with at least one value"
        if any(a == b for a, b in itertools.combinations(values, 2)):
            return None, f".values = {values!r} holds a value twice"
        return Domain(key, values), ""
    low: Any = entry.get("low")
    high: Any = entry.get("high")
    scale = entry.get("scale", "linear")
    points = entry.get("points", 0)
    if not (_is_number(low) and _is_number(high) and low < high):
        return None, f": low = {low!r} and high = {high!r} should be two numbers, low below high"
    if scale not in ("linear", "log"):
        return None, f".scale = {scale!r} should be 'linear' or 'log'"
    if scale == "log" and low <= 0:
        return None, f".low = {low!r} should be above 0 for scale = 'log'"
    if not isinstance(points, int) or isinstance(points, bool) or points < 0:
        return None, f".points = {points!r} should be how many values of the range a grid takes"
    return Domain(key, (), low, high, scale, points), ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def grid(domains: Sequence[Domain]) -> list[dict[str, Any]]:
    """Returns every combination of the domains' values; the last key varies fastest."""
    axes = [domain.grid() for domain in domains]
    keys = [domain.key for domain in domains]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*axes)]


def draw(domains: Sequence[Domain], count: int, seed: int, method: str) -> list[dict[str, Any]]:
    """Draws points; the first of more points are the same points.

    Args:
        domains: what to draw from.
        count: how many.
        seed: fixes the draw.
        method: "random" (independent) or "halton" (scrambled Halton sequence, which leaves smaller
            holes; Halton 1960, as in AlgoPerf's tuning, arXiv 2306.07179).
    """
    if method == "halton":
        from scipy.stats import qmc

        places = qmc.Halton(len(domains), scramble=True, rng=seed).random(count)
    else:
        generators = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in range(count)]
        places = [generator.random(len(domains)) for generator in generators]
    return [
        {domain.key: domain.at(float(u)) for domain, u in zip(domains, row, strict=True)}
        for row in places
    ]
